"""An aligner outside the model, and the state that its own optimizer saves and loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_world import World
from train_support import arguments, parts

from motionenhancer.alignment.aligner import align, build_aligner, load_aligner, save_aligner
from motionenhancer.alignment.aligner_training import AlignerTraining
from motionenhancer.alignment.trainer import MotionTrainer

SETTINGS = SimpleNamespace(learning_rate=0.1, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8)


@pytest.mark.parametrize("name", ["mlp", "pointwise", "conv"])
def test_a_saved_aligner_is_the_same_function(tmp_path: Path, name: str) -> None:
    aligner = build_aligner(name, (2, 3, 4), width=32)
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    file = tmp_path / "new" / "aligner.safetensors"
    save_aligner(aligner, file)
    again = load_aligner(file)
    maps = torch.rand(5, 24)
    assert torch.equal(again(maps), aligner(maps))
    assert not torch.allclose(again(maps), maps)
    assert (again.kind, again.grid, again.width) == (name, (2, 3, 4), 32)
    assert [p.name for p in file.parent.iterdir()] == ["aligner.safetensors"]


def test_files_that_are_no_aligner(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_aligner(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    for name in ("model", "broken"):
        with pytest.raises(ValueError, match="not a file that save_aligner wrote"):
            load_aligner(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="Identity"):
        save_aligner(build_aligner("identity", (2, 3, 4)), tmp_path / "a.safetensors")


def step(training: AlignerTraining, seed: int, share: float = 1.0) -> None:
    for index, parameter in enumerate(training.module.parameters()):
        generator = torch.Generator().manual_seed(100 * seed + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    training.finish_gradients(1)
    training.step(share)
    training.clear()


def test_its_steps_are_adamws_at_the_share_of_the_rate() -> None:
    aligner, other = (build_aligner("conv", (2, 3, 4)) for _ in range(2))
    training = AlignerTraining(aligner, SETTINGS)
    step(training, 1, share=0.5)
    reference = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.0, fused=True)
    for index, parameter in enumerate(other.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + index))
    reference.step()
    for mine, theirs in zip(aligner.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None


def test_it_goes_on_from_its_files(tmp_path: Path) -> None:
    whole, cut, late = (AlignerTraining(build_aligner("mlp", (2, 3, 4)), SETTINGS) for _ in range(3))
    for seed in range(4):
        step(whole, seed)
    for seed in range(2):
        step(cut, seed)
    cut.save(tmp_path)
    late.load(tmp_path)
    for seed in range(2, 4):
        step(late, seed)
    for mine, theirs in zip(late.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="not the aligner of this run"):
        AlignerTraining(build_aligner("conv", (2, 3, 4)), SETTINGS).load(tmp_path)
    with pytest.raises(ValueError, match="this checkpoint has no aligner"):
        late.load(tmp_path / "elsewhere")


def test_a_scalers_factor_is_taken_off() -> None:
    training = AlignerTraining(build_aligner("mlp", (2, 3, 4)), SETTINGS)
    parameter = next(training.module.parameters())
    parameter.grad = torch.full_like(parameter, 8.0)
    training.finish_gradients(1, loss_scale=4.0)
    assert torch.equal(parameter.grad, torch.full_like(parameter, 2.0))


@pytest.mark.parametrize(("most", "share"), [(0.0, 1.0), (1e9, 1.0), (6.0, 0.6)])
def test_its_gradients_are_clipped_together(most: float, share: float) -> None:
    training = AlignerTraining(build_aligner("mlp", (2, 3, 4)), SETTINGS)
    parameters = list(training.module.parameters())
    parameters[0].grad, parameters[1].grad = (torch.zeros_like(p) for p in parameters[:2])
    parameters[0].grad.view(-1)[0], parameters[1].grad.view(-1)[0] = 8 * 6.0, 8 * 8.0
    norm = training.finish_gradients(1, loss_scale=8.0, max_norm=most)
    assert float(norm) == 10.0, "before clipping, without the scaler's factor"
    found = [float(p.grad.view(-1)[0]) for p in parameters[:2]]
    assert found == pytest.approx([6.0 * share, 8.0 * share], rel=1e-6)


def test_the_aligners_rate_follows_the_runs_schedule(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    monkeypatch.setattr(AlignerTraining, "step", lambda self, share: shares.append(share))
    model, dataset, collator = parts(world, tmp_path)
    trainer = MotionTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=6, warmup_steps=2, lr_scheduler_type="linear"),
        train_dataset=dataset,
        data_collator=collator,
        aligner=build_aligner("mlp", (5, 8, 8)),
        # The vision tower has another peak rate; the share of the peak is the same.
        learning_rates=lambda name: 1e-7 if "visual" in name else None,
    )
    trainer.train()
    assert shares == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25])


def test_the_runs_max_grad_norm_holds_for_the_aligner(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    original = AlignerTraining.step

    def step(self: AlignerTraining, share: float) -> None:
        norms.append(torch.cat([p.grad.flatten() for p in self.module.parameters()]).norm())
        original(self, share)

    monkeypatch.setattr(AlignerTraining, "step", step)
    for most in (0.0, 1e-4):
        model, dataset, collator = parts(world, tmp_path)
        MotionTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=1, max_grad_norm=most),
            train_dataset=dataset,
            data_collator=collator,
            aligner=build_aligner("mlp", (5, 8, 8)),
        ).train()
    assert norms[0] > 2e-4
    assert float(norms[1]) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("fp16", [False, True])
def test_a_gradient_that_is_no_number_never_reaches_the_aligner(fp16: bool) -> None:
    """In half precision the aligner's step is left out, as the scaler leaves out the model's step."""
    aligner = build_aligner("mlp", (2, 3, 4))
    before = {k: v.clone() for k, v in aligner.state_dict().items()}
    trainer = object.__new__(MotionTrainer)
    trainer.args = SimpleNamespace(fp16=fp16, world_size=1, max_grad_norm=1.0)
    trainer.state, trainer._step_ids = SimpleNamespace(global_step=3), ["a", "b"]
    trainer.accelerator = SimpleNamespace(optimizer_step_was_skipped=False)
    trainer.optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    trainer._aligner_training = AlignerTraining(aligner, SETTINGS)
    parameter = next(aligner.parameters())
    for value, steps in ((float("nan"), False), (1.0, True)):
        trainer._aligner_training.clear()
        parameter.grad = torch.full_like(parameter, value)
        if fp16 or steps:
            trainer.finish_aligner_gradients()
            trainer.step_aligner()
        else:
            with pytest.raises(FloatingPointError, match=r"aligner's gradient is nan at step 3.*'a', 'b'"):
                trainer.finish_aligner_gradients()
        assert all(torch.isfinite(p).all() for p in aligner.parameters())
        assert steps != all(torch.equal(v, before[k]) for k, v in aligner.state_dict().items())


@pytest.mark.parametrize("loss", ["l2", "squared", "mse", "kl"])
@pytest.mark.parametrize("kind", ["identity", "conv"])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 0.2, 1.0]], ids=["even", "gated"])
def test_a_batch_is_its_samples_one_by_one(loss: str, kind: str, weights: list[float] | None) -> None:
    """Unequal rows and grids, a token of two rows, a sample without a prior."""
    generator = torch.Generator().manual_seed(0)
    priors = [
        None
        if count == 0
        else SimpleNamespace(attention=torch.rand(count, 24, generator=generator).half(), grid=(2, 3, 4))
        for count in (2, 5, 0, 3)
    ]
    grids = [(2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 2, 4)]
    tokens = torch.tensor([[0, 1, -1, -1, -1, -1], [0, 1, 2, 3, 4, 4], [-1] * 6, [2, 1, 0, -1, -1, -1]])
    aligner = build_aligner(kind, (2, 3, 4)).double()
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    maps = torch.rand(4, 6, 8, dtype=torch.float64, generator=generator)
    found, single = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    options = {"aligner": aligner, "loss": loss}
    whole = align(found, priors, grid=grids, row_tokens=tokens, weights=weights, **options)
    terms = [
        align(
            single[i : i + 1],
            priors[i],
            grid=grids[i],
            row_tokens=tokens[i : i + 1],
            weights=None if weights is None else weights[i : i + 1],
            **options,
        )
        for i in (0, 1, 3)
    ]
    expected = torch.stack(terms).sum() / 3
    torch.testing.assert_close(whole, expected, rtol=1e-7, atol=0)
    whole.backward()
    expected.backward()
    torch.testing.assert_close(found.grad, single.grad, rtol=1e-6, atol=1e-10)
