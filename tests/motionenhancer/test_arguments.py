from __future__ import annotations

from pathlib import Path

import pytest

from motionenhancer.arguments import DataArguments, PriorArguments, parse_arguments
from motionenhancer.prior import PriorSettings
from motionenhancer.store import DEFAULT_DIR


def parse(*argv: str, **options: object) -> tuple[DataArguments, PriorArguments]:
    return parse_arguments((DataArguments, PriorArguments), argv, prog="test", **options)


def test_defaults_make_the_papers_settings() -> None:
    data, prior = parse()
    assert data.data is None
    assert prior.settings() == PriorSettings()
    assert prior.prior_dir == DEFAULT_DIR, "without arguments the store looks where extraction writes"


def test_flags_override_the_file_which_overrides_the_recipe(tmp_path: Path) -> None:
    recipe, config = tmp_path / "recipe.yaml", tmp_path / "config.yaml"
    recipe.write_text("ddim_steps: 2\nguidance_scale: 3\nhead_ratio: 0.25\n")
    config.write_text("guidance_scale: 4\nhead_ratio: 0.75\n")
    _, prior = parse("--config", str(config), "--head_ratio", "1.0", recipe=lambda chosen: recipe)
    assert (prior.ddim_steps, prior.guidance_scale, prior.head_ratio) == (2, 4, 1.0)


def test_a_files_values_are_read_like_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("sampled_rows: 32\nguidance_scale: 1e1\nmemory: no\nlimit: 3\nteacher:\n")
    data, prior = parse("--config", str(config))
    assert prior.settings().sampled_rows == 32
    assert (prior.guidance_scale, prior.memory, prior.teacher, data.limit) == (10.0, False, None, 3)
    config.write_text("prompt_source: everything\n")
    with pytest.raises(SystemExit):
        parse("--config", str(config))
    assert "prompt_source must be one of both, question, answer, got 'everything'" in capsys.readouterr().err


def test_selections_are_switched_off_by_flags_and_files(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("head_selection: off\n")
    _, prior = parse("--config", str(config), "--token_selection", "off")
    assert prior.settings() == PriorSettings(head_selection="off", token_selection="off")


def test_the_recipe_is_chosen_by_what_was_given(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("teacher: here\n")
    seen = []
    parse("--config", str(config), recipe=lambda chosen: seen.append(chosen.teacher))
    assert seen == ["here"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("guidence_scale: 3\n", "unknown field 'guidence_scale' (did you mean 'guidance_scale'?)"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: [\n", "not valid yaml"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, body: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(body)
    with pytest.raises(SystemExit):
        parse("--config", str(config))
    message = capsys.readouterr().err
    assert said in message
    assert str(config) in message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--nonsense", "1"], "--nonsense"),
        (["--prompt_source", "title"], "title"),
        (["--ddim_steps", "two"], "two"),
    ],
)
def test_bad_flags(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["none", "-3", "0", "1.5"])
def test_rows_that_are_no_count(rows: str) -> None:
    with pytest.raises(ValueError, match="sampled_rows"):
        parse("--sampled_rows", rows)[1].settings()


def test_all_rows() -> None:
    assert parse("--sampled_rows", "all")[1].settings().sampled_rows == "all"


def test_the_recipes_in_the_repository_hold_known_fields() -> None:
    from motionenhancer.train import StudentArguments, TrainArguments

    folder = Path(__file__).parents[2] / "configs"
    recipes = sorted(folder.glob("*.yaml"))
    assert {"qwen2_5_vl", "internvl3"} <= {recipe.stem for recipe in recipes}
    for recipe in recipes:
        _, _, _, training = parse_arguments(
            (StudentArguments, DataArguments, PriorArguments, TrainArguments),
            ["--config", str(recipe), "--bf16", "false"],
            prog="test",
        )
        if recipe.stem in ("qwen2_5_vl", "internvl3"):
            assert training.learning_rate == 1e-5


def test_weights_may_be_a_list_in_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("ddim_steps: 2\nstep_weights: [0, 1]\n")
    assert parse("--config", str(config))[1].settings().step_weights == (0.0, 1.0)


def test_a_list_in_yaml_is_what_commas_are_in_a_flag(tmp_path: Path) -> None:
    from motionenhancer.train import StudentArguments

    config = tmp_path / "config.yaml"
    config.write_text("lora_r: 4\nlora_target: [q_proj, v_proj]\n")
    (student,) = parse_arguments((StudentArguments,), ["--config", str(config)], prog="test")
    assert student.lora_target == "q_proj,v_proj"


def test_weights_that_are_no_numbers_are_named_once() -> None:
    with pytest.raises(ValueError, match=r"^--step_weights must be numbers between commas, got '1,x'$"):
        parse("--step_weights", "1,x")[1].settings()


def test_errors_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--nonsense", "1")
    assert len(capsys.readouterr().err.splitlines()) <= 3
