"""The training script, run as a process: what it leaves behind, what it refuses."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from child_process import start_forked

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo_model.py"
SIZES = {"layers": 2, "hidden": 16, "ffn": 32, "heads": 2, "positions": 64, "vocab": 300, "sequence": 16, "batch": 2}
RECIPE = {**SIZES, "steps": 6, "warmup": 2, "seed": 7}
TINY = [f"--{name}={value}" for name, value in RECIPE.items()]
PARAGRAPHS = [f"Paragraph {n}\tspeaks  of {n * n} sheep." for n in range(2000)]
DEADLINE_S = 60


def run_script(log: Path, *arguments: str | Path) -> int:
    """Its exit code. The log gets its stderr."""
    with start_forked(SCRIPT, *arguments, log=log) as process:
        process.read(DEADLINE_S)
        return process.wait(DEADLINE_S)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sheep.txt"
    path.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(fork_server: None, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    log = text_file.with_name("log")
    assert run_script(log, text_file, "--out", out, *TINY) == 0, log.read_text()
    return out


def test_output_loads_and_generates(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)
    prompt = tokenizer("Paragraph 1", return_tensors="pt")
    assert prompt.input_ids[0, 0] == tokenizer.bos_token_id
    generated = model.float().generate(**prompt, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == prompt.input_ids.shape[1] + 4
    assert str(tokenizer.decode(generated[0], skip_special_tokens=True)).startswith("Paragraph 1")


def test_heldout_text_is_every_fiftieth_group_and_not_in_calibration(trained: Path) -> None:
    heldout = (trained / "heldout.txt").read_text(encoding="utf-8").split("\n\n")
    calibration = (trained / "calibration.txt").read_text(encoding="utf-8").split("\n\n")
    folded = [" ".join(paragraph.split()) for paragraph in PARAGRAPHS]
    assert heldout == folded[980:1000] + folded[1980:2000]
    assert len(calibration) > len(heldout)
    assert not set(heldout) & set(calibration)


def test_finished_folder_holds_the_assets_files_and_no_checkpoint(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "RECIPE.md",
        "calibration.txt",
        "config.json",
        "generation_config.json",
        "heldout.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_non_empty_out_is_refused_and_left_alone(fork_server: None, text_file: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep", encoding="utf-8")
    assert run_script(log, text_file, "--out", out, *TINY) == 2
    assert f"--out {out}: the folder is not empty" in log.read_text(encoding="utf-8")
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_resumed_training_ends_with_the_same_weights(script: ModuleType, tmp_path: Path) -> None:
    import torch

    stream = torch.randint(RECIPE["vocab"], (500,), generator=torch.Generator().manual_seed(3))
    whole, cut = (script.Trainer(script.Recipe(**RECIPE), stream) for _ in range(2))
    for _ in range(3):
        cut.advance()
    cut.save(tmp_path / "checkpoint")
    resumed = script.Trainer(script.Recipe(**RECIPE), stream)
    resumed.restore(tmp_path / "checkpoint")
    for trainer in (whole, resumed):
        while trainer.step < RECIPE["steps"]:
            trainer.advance()
    expected = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_checkpoint_of_another_recipe_or_text_is_refused(script: ModuleType, tmp_path: Path) -> None:
    import torch

    stream = torch.arange(100)
    script.Trainer(script.Recipe(**RECIPE), stream).save(tmp_path / "checkpoint")
    with pytest.raises(script.UsageError, match="the run to resume had --l1"):
        script.Trainer(script.Recipe(**RECIPE, l1=0.1), stream).restore(tmp_path / "checkpoint")
    with pytest.raises(script.UsageError, match="the run to resume had SHA-256 of training tokens"):
        script.Trainer(script.Recipe(**RECIPE), stream + 1).restore(tmp_path / "checkpoint")
