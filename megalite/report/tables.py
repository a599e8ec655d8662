"""Tables of the page. Cells are already HTML."""

from collections.abc import Container, Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], long: Container[int] = ()) -> str:
    """A table of figures. long: indices of columns whose text may wrap."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            kind = " class=long" if column in long else ""
            cells.append(f"<td{kind}>{cell}</td>")
        lines.append("".join(cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="figures">{body}</table>'


def wide(content: str) -> str:
    """Content that scrolls if it is wider than the page."""
    return f'<div class="wide">{content}</div>'
