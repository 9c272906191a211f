from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from motionenhancer.evaluation.arguments import EvalArguments
from motionenhancer.flags import flag_of, parse_arguments, parse_options
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.settings import DataArguments


def parse(*argv: str, **options: object) -> tuple[DataArguments, PriorArguments, PriorSettings]:
    return parse_arguments((DataArguments, PriorArguments, PriorSettings), argv, prog="test", **options)


def test_defaults_make_the_papers_settings() -> None:
    data, _, settings = parse()
    assert data.data is None
    assert settings == PriorSettings()


def test_flags_override_the_file_which_overrides_the_recipe(tmp_path: Path) -> None:
    recipe, config = tmp_path / "recipe.yaml", tmp_path / "config.yaml"
    recipe.write_text("ddim_steps: 2\nguidance_scale: 3\nhead_ratio: 0.25\n")
    config.write_text("guidance_scale: 4\nhead_ratio: 0.75\n")
    *_, settings = parse("--config", str(config), "--head_ratio", "1.0", recipe=lambda chosen: recipe)
    assert (settings.steps, settings.guidance_scale, settings.head_ratio) == (2, 4, 1.0)


def test_a_files_values_are_read_like_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("sampled_rows: 32\nguidance_scale: 1e1\nmemory: no\nlimit: 3\nteacher:\n")
    data, prior, settings = parse("--config", str(config))
    assert settings.sampled_rows == 32
    assert (settings.guidance_scale, settings.memory, prior.teacher, data.limit) == (10.0, False, None, 3)
    config.write_text("prompt_source: everything\n")
    with pytest.raises(SystemExit):
        parse("--config", str(config))
    assert "prompt_source must be one of both, question, answer, got 'everything'" in capsys.readouterr().err


def test_selections_are_switched_off_by_flags_and_files(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("head_selection: off\n")
    *_, settings = parse("--config", str(config), "--token_selection", "off")
    assert settings == PriorSettings(head_selection="off", token_selection="off")


def test_the_recipe_is_chosen_by_what_was_given(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("teacher: here\n")
    seen = []
    parse("--config", str(config), recipe=lambda chosen: seen.append(chosen.teacher))
    assert seen == ["here"]


def aliases(depth: int) -> str:
    """A short file whose value would have 2 ** depth parts."""
    value = "&a0 [x, x]"
    for i in range(1, depth):
        value = f"&a{i} [{value}, *a{i - 1}]"
    return f"head_ratio: {value}\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("guidence_scale: 3\n", "unknown field 'guidence_scale' (did you mean 'guidance_scale'?)"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: [\n", "not valid yaml"),
        ("ddim_steps:\n", "ddim_steps must have a value"),
        ("head_ratio: {a: 1}\n", "head_ratio must be a number, got {'a': 1}"),
        ("head_ratio: 2020-01-01\n", "head_ratio must be a number, got 2020-01-01"),
        ("head_ratio: !!set {1}\n", "head_ratio must be a number, got {1"),
        ("head_ratio: !!binary aGVsbG8=\n", "head_ratio must be a number, got b'hello'"),
        ("data: {a: 1}\n", "data must be a text, got {'a': 1}"),
        ("teacher: [2020-01-01]\n", "teacher must be a text, got"),
        ("limit: " + "[" * 10_000, "not valid yaml (maximum recursion"),
        ("limit: 2020-13-01\n", "not valid yaml (month must be"),
        (aliases(40), "its aliases make, more than 100000 values"),
        ("head_ratio: &a [*a]\n", "its aliases make, more than 100000 values"),
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
def test_rows_that_are_no_count(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--sampled_rows", rows)
    assert 'sampled_rows must be a positive int or "all"' in capsys.readouterr().err


def test_all_rows() -> None:
    assert parse("--sampled_rows", "all")[2].sampled_rows == "all"


def test_the_recipes_in_the_repository_hold_known_fields() -> None:
    from motionenhancer.settings import StudentArguments
    from motionenhancer.training.arguments import TrainArguments

    folder = Path(__file__).parents[2] / "configs"
    recipes = sorted(folder.glob("*.yaml"))
    assert {"qwen2_5_vl", "internvl3"} <= {recipe.stem for recipe in recipes}
    for recipe in recipes:
        *_, training = parse_arguments(
            (StudentArguments, DataArguments, PriorArguments, PriorSettings, TrainArguments),
            ["--config", str(recipe), "--bf16", "false"],
            prog="test",
        )
        if recipe.stem in ("qwen2_5_vl", "internvl3"):
            assert training.learning_rate == 1e-5


def test_weights_may_be_a_list_in_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("ddim_steps: 2\nstep_weights: [0, 1]\n")
    assert parse("--config", str(config))[2].step_weights == (0.0, 1.0)


def test_a_list_in_yaml_is_what_commas_are_in_a_flag(tmp_path: Path) -> None:
    from motionenhancer.settings import StudentArguments

    config = tmp_path / "config.yaml"
    config.write_text("lora_r: 4\nlora_target: [q_proj, v_proj]\n")
    (student,) = parse_arguments((StudentArguments,), ["--config", str(config)], prog="test")
    assert student.lora_target == "q_proj,v_proj"


def test_weights_that_are_no_numbers_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--step_weights", "1,x")
    assert capsys.readouterr().err.endswith("--step_weights must be numbers separated by commas, got '1,x'\n")


def test_a_field_may_have_a_flag_of_another_name(capsys: pytest.CaptureFixture[str]) -> None:
    *_, settings = parse("--ddim_steps", "2", "--prior_seed", "7", "--prior_mode", "renoise")
    assert (settings.steps, settings.seed, settings.mode) == (2, 7, "renoise")
    with pytest.raises(SystemExit):
        parse("--ddim_steps", "0")
    assert "error: --ddim_steps must be at least 1, got 0" in capsys.readouterr().err


def test_a_misspelt_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--hed_ratio", "1", "--limt=3")
    error = capsys.readouterr().err
    assert "(did you mean '--head_ratio'?)" in error
    assert "(did you mean '--limit'?)" in error


def test_every_flag_is_declared_once() -> None:
    """One command cannot declare a flag twice; this test compares the flags of all commands."""
    from motionenhancer import settings
    from motionenhancer.training.arguments import ValidationArguments

    owners: dict[str, set[str]] = {}
    for cls in (PriorSettings, ValidationArguments, EvalArguments, *vars(settings).values()):
        if (
            is_dataclass(cls)
            and isinstance(cls, type)
            and issubclass(cls, (settings.Settings, PriorSettings))
        ):
            for one in fields(cls):
                if one.name in cls.__annotations__:
                    owners.setdefault(flag_of(one), set()).add(cls.__name__)
    twice = {name: found for name, found in owners.items() if len(found) > 1}
    assert twice == {
        "dry_run": {"ExtractArguments", "StudentArguments"},
        "output_dir": {"EvalArguments", "ToyArguments"},
        "prior_dir": {"PriorArguments", "StoreArguments"},
        "seed": {"EvalArguments", "ToyArguments"},
        "max_pixels": {"EvalArguments", "StudentArguments"},
        # In LookArguments: of one clip, without a default.
        "student": {"LookArguments", "ShownArguments"},
        "num_frames": {"LookArguments", "ShownArguments"},
    }


def test_help_shows_our_groups_and_hides_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    from motionenhancer import train

    shown = {}
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            train.main([option])
        assert stop.value.code == 0
        shown[option] = capsys.readouterr().out
    for text in shown.values():
        assert "The student, and how it is aligned:" in text
        assert "--alignment_weight" in text
        assert "--learning_rate" in text
        for refused in ("--hub_always_push", "--remove_unused_columns"):
            assert refused not in text, "an option that is refused is not offered"
        assert "  --alignment_schedule constant|" in text
        assert "-schedule" not in text, "one name of a flag is enough"
        assert "  --normalize_rows [true|false]\n" in text
        assert "--no_" not in text
        assert "(default: None)" not in text
    assert "--adam_beta1" not in shown["--help"]
    assert "--adam_beta1" in shown["--help_all"]


def test_errors_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--nonsense", "1")
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_a_value_from_python_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"--limit must be a number, got \{1\}"):
        parse_options((DataArguments,), {"limit": {1}}, prog="test")
