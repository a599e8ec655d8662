"""The doctor's findings from the output of hosts and nvidia-smi (megalite/doctor)."""

import json
import socket
from pathlib import Path

import pytest

from megalite.doctor import gpus
from megalite.doctor.examine import main
from megalite.doctor.findings import findings
from megalite.doctor.probe import probe
from megalite.errors import ConfigError


def test_each_finding_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wanted = {
            "paths": [str(tmp_path / "a"), str(tmp_path / "b")],
            "folders": [str(tmp_path)],
            "port": port,
        }
        first = probe(wanted) | {"clock_error": 0.0}
    assert not first["port_free"]
    other = json.loads(json.dumps(first))
    other["versions"]["torch"], other["versions"]["numpy"] = "1.0", "none"
    other["files"][str(tmp_path / "a")] = None
    other["files"][str(tmp_path / "b")][2] = "x"
    other |= {"memory": 2**30, "gpus": 1, "clock_error": -3.0}
    other["disks"][str(tmp_path)] = 5
    assert [*findings({"h0": first | {"port_free": True}}, {"h0": 1}, port, 0)] == []
    found = "\n".join(findings({"h0": first, "h1": other}, {"h0": 1, "h1": 2}, port, 10))
    for said in (
        f"h0: port {port} is in use", "h1: torch is 1.0, on h0 ", "h1: numpy is not installed", "a: cannot be read",
        "b: other content than on h0", "h1: 1.0 GiB of memory are free for 2 ranks", "slots=2: it has 1 GPU: ",
        "checkpoints need", "off by at least -3.0 s",
    ):  # fmt: skip
        assert said in found
    assert len(found.splitlines()) == 9


NVIDIA_SMI = """#!/bin/sh
case "$*" in *memory.used*noheader,nounits) ;; *) echo "Field is not a valid field to query."; exit 2 ;; esac
echo "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0"
echo "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 40000, [N/A]"
echo "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 3"
"""


def test_output_of_nvidia_smi_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.facts() == "nvidia-smi not found"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    seen = gpus.facts()
    assert isinstance(seen, list)
    assert gpus.line(seen) == "3 × NVIDIA H100 80GB HBM3, 81559 MiB, driver 550.54.15"
    assert [*gpus.gpu_findings("h0", seen[:1], "h0", seen[:1])] == []
    older = [{**gpu, "driver": "535.1"} for gpu in seen]
    found = [*gpus.gpu_findings("h1", older, "h0", seen)]
    assert len(found) == 3 and "on h0 3 × NVIDIA H100" in found[0]
    assert "GPU 1: 40000 MiB are in use" in found[1] and "GPU 2: 3 uncorrected" in found[2]
    program.write_text("#!/bin/sh\necho driver/library version mismatch; exit 18\n")
    said = [*gpus.gpu_findings("h1", gpus.facts(), "h0", seen)]
    assert said[0].startswith("h1: nvidia-smi: driver/library version mismatch: ")


def test_a_probe_finds_what_exists_and_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a" * 3000)
    wanted = {
        "paths": [str(tmp_path / "a"), str(tmp_path / "none")],
        "folders": [str(tmp_path / "to/be/made")],
        "port": None,
    }
    seen = probe(wanted)
    size, _, digest = seen["files"][str(tmp_path / "a")]
    assert (size, len(digest)) == (3000, 12) and seen["files"][str(tmp_path / "none")] is None
    assert seen["disks"][str(tmp_path / "to/be/made")] > 0 and not (tmp_path / "to").exists()
    assert seen["port_free"] and seen["memory"] > 0 and seen["cores"] > 0
    assert json.loads(json.dumps(seen)) == seen
    (tmp_path / "a").write_text("b" + "a" * 2999)
    assert probe(wanted)["files"][str(tmp_path / "a")][2] != digest


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a=1"], "a=1: needs --deepspeed_config, whose keys it sets"),
        (["--master_port", "70000"], "--master_port: 70000: must be .* at most 65535"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        main(["--num_gpus", "1", *words])
