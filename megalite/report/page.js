"use strict";
// What is under the pointer: a line through every chart at that step, and the values of each run there.
const hover = document.getElementById("hover");
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 6 });

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
}

for (const chart of document.querySelectorAll("svg.chart")) {
  const { box, curves } = JSON.parse(chart.dataset.curves);
  const [left, right, top, bottom, x0, x1] = box;
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cross.setAttribute("class", "cross");
  cross.setAttribute("y1", top);
  cross.setAttribute("y2", bottom);
  cross.style.display = "none";
  chart.append(cross);

  chart.addEventListener("pointermove", (event) => {
    const area = chart.getBoundingClientRect();
    const at = ((event.clientX - area.left) / area.width) * chart.viewBox.baseVal.width;
    const x = x0 + ((at - left) / (right - left)) * (x1 - x0);
    const found = curves.filter((c) => c.points.length).map((c) => [c, nearest(c.points, x)]);
    if (!found.length || at < left - 8) return leave();
    const step = found[0][1][0];
    const place = left + ((step - x0) / (x1 - x0)) * (right - left);
    cross.setAttribute("x1", place);
    cross.setAttribute("x2", place);
    cross.style.display = "";
    hover.replaceChildren(`step ${number.format(step)}`);
    for (const [curve, point] of found) {
      const line = document.createElement("div"), dot = document.createElement("i");
      dot.className = "c" + curve.colour;
      line.append(dot, `${curves.length > 1 ? curve.name + ": " : ""}${number.format(point[1])}`);
      hover.append(line);
    }
    hover.style.display = "block";
    const width = hover.offsetWidth;
    hover.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4)) + "px";
    hover.style.top = Math.max(4, event.clientY - hover.offsetHeight - 12) + "px";
  });
  function leave() {
    hover.style.display = "none";
    cross.style.display = "none";
  }
  chart.addEventListener("pointerleave", leave);
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
