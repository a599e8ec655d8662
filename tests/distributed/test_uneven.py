"""Four copies of a model whose vocabulary the tensor axis cuts unevenly: the same training as one process, and the
copies of whole weights on the tensor axis stay bitwise equal, which recording them checks."""

from pathlib import Path

import pytest

from megalite.config import Config
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Trace
from megalite.prove.verify import Spread
from tests.small_models import MODELS
from tests.traces import Request, document, marked_corpus, nothing, traces

STEPS, BATCH = 3, 8
MASKED = {"masked": 0.4, "mask_token_id": 3, "special_token_ids": [0, 1, 2]}
ENCODER = {"reset_attention": True, "objective": MASKED, "loss": "all"}
LAYOUTS = [Layout(tensor=2, data=4, zero=zero, micro=1) for zero in range(4)]


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, marked_corpus(folder / "corpus")

    def record(self, layouts: list[Layout]) -> list[Trace]:
        requests: list[Request] = []
        for layout in layouts:
            json = document(self.corpus, "llama", False, BATCH)
            json["megalite"]["model"] = MODELS["bert"] | {"num_hidden_layers": 2}
            json["megalite"]["data"] |= {"sequence_length": 32, **ENCODER}
            config = config_of(Config.from_dict(json), layout, BATCH)
            requests.append((config.to_json(), nothing, self.folder / str(layout)))
        return traces(layouts[0].world_size, STEPS, requests)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spread, dict[Layout, Trace]]:
    runs = Runs(tmp_path_factory.mktemp("uneven"))
    alone = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
    reference, *others = runs.record(alone)
    return Spread(reference, others), dict(zip(LAYOUTS, runs.record(LAYOUTS), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_copies_stay_equal(recorded: tuple[Spread, dict[Layout, Trace]], layout: Layout) -> None:
    spread, found = recorded
    verdict = spread.judge(found[layout])
    assert not verdict.first, verdict.first
