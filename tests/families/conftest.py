"""Which pipelines the contract runs on, and what its tests share of each.

--pipelines DIR (may be repeated): a diffusers folder, or a folder that holds some. Without it, tiny ones of all supported families.
`make test` takes one of these, `make test-all` one or two of each family; two of each: pytest -m 'not gpu' tests/families --every-variant.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# what `make test` runs; `make test-all` and --pipelines run the rest. Flow models have fast tests in test_flow_families and a golden trace.
QUICK = ("sd1-2",)
# one variant says enough of the newest: the one that is not as published, or the one that is guided
ONE = {"flux2-klein": 1, "z-image": 2, "qwen-image": 2}
# of code that does not know the family: without --every-variant, the older families say enough
SHARED = {"test_run_resumed_is_the_straight_run", "test_state_dict_carries_the_policy", "test_lora_of_ours_is_sampled_as_it_was_saved"}


def pytest_generate_tests(metafunc):
    if "source" in metafunc.fixturenames:
        sources = _sources(metafunc.config)
        if not metafunc.config.getoption("--pipelines"):
            if metafunc.function.__name__ in SHARED and not metafunc.config.getoption("--every-variant"):
                sources = [source for source in sources if source.rpartition("-")[0] not in ONE]
            sources = [source if source in QUICK else pytest.param(source, marks=pytest.mark.slow) for source in sources]
        metafunc.parametrize("source", sources, ids=lambda source: Path(source).name, scope="session")


def _sources(config):
    """Folders, or names of tiny pipelines still to be written."""
    from conventions import CALLS

    from tdpo_cli.models import FAMILIES

    given = [Path(folder) for folder in config.getoption("--pipelines")]
    if not given:
        tiny = [CALLS[name].tiny for name in FAMILIES if name in CALLS]
        every = config.getoption("--every-variant")
        return [f"{name}-{variant}" for name in tiny for variant in (1, 2) if every or ONE.get(name, variant) == variant]
    found = []
    for folder in given:
        inside = [folder] if (folder / "model_index.json").is_file() else sorted(file.parent for file in folder.glob("*/model_index.json"))
        if not inside:
            raise pytest.UsageError(f"--pipelines {folder}: no model_index.json there, and none in its folders")
        found += inside
    return found


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="session")
def case(source, tiny_folder, tmp_path_factory):
    """One pipeline under test; skips where this installation cannot load it."""
    import transformers
    from subject import Case

    from tdpo_cli import models
    from tdpo_cli.errors import RequestError

    if isinstance(source, str):
        if int(transformers.__version__.split(".")[0]) < 5:
            pytest.skip("writing tiny pipelines needs transformers 5; give folders with --pipelines")
        import make_tiny

        family, variant = source.rsplit("-", 1)
        source = make_tiny.build(family, tiny_folder / source, int(variant))
    name = json.loads((source / "model_index.json").read_text())["_class_name"]
    try:
        models.check_installed(str(source), models.FAMILIES[models.pipeline_class(str(source), {"_class_name": name})])
    except RequestError as error:
        pytest.skip(str(error))
    return Case(source, name, tmp_path_factory.mktemp("loras"))
