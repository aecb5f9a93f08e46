"""Losses of the image tokenizer that do not go with the rest of a run are refused before any file is read."""

from __future__ import annotations

import pytest

from cogview_pl.assembly.image_tokenizer_losses import settings_of_losses
from cogview_pl.errors import UserError
from cogview_pl.tasks.fit_image_tokenizer import check

from ..composed import composed

RUN = ("task=vqvae", "image_tokenizer=small_gan", "trainer.max_steps=2000", "plan.strict=false")
NAME = "image_tokenizer.adversarial"

CASES: dict[str, tuple[list[str], list[str]]] = {
    "never_starts": (["trainer.max_steps=1000"], [f"{NAME}.start=1000", "trainer.max_steps=1000"]),
    "starts_before_the_codebook": (
        [f"{NAME}.start=99"],
        [f"{NAME}.start=99", "first 100 steps", "image_tokenizer.quantize_after_steps"],
    ),
    "small_images": (
        [f"{NAME}.layers=5"],
        [f"{NAME}.layers=5", "96 pixels", "image_tokenizer.image_size=64"],
    ),
    "three_betas": ([f"{NAME}.betas=[0.1,0.2,0.3]"], [f"{NAME}.betas=[0.1, 0.2, 0.3]", "two numbers"]),
    "no_betas": (
        ["optimizer.optimizer._target_=torch.optim.SGD", *(f"~optimizer.optimizer.{key}" for key in ("betas", "eps"))],
        [f"{NAME}.betas=[0.5, 0.9]", "the optimizer has no betas", "null"],
    ),
    "compiled": (["compile=true"], [f"{NAME}.adaptive=true", "compile=false"]),
    "decoder_of_nothing": (["image_tokenizer.trained_part=decoder"], ["image_tokenizer.trained_part", "init_from"]),
    "decoder_without_codes": (
        ["image_tokenizer.trained_part=decoder", "init_from=a", "image_tokenizer.quantize_after_steps=5"],
        ["image_tokenizer.quantize_after_steps=5", "image_tokenizer.trained_part=decoder"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_error_names_the_keys(name: str) -> None:
    words, parts = CASES[name]
    with pytest.raises(UserError) as raised:
        check(composed(*RUN, *words))
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize("words", [(), (f"{NAME}.betas=null",), ("optimizer=muon",), (f"{NAME}.adaptive=false",)])
def test_what_goes_together_passes(words: tuple[str, ...]) -> None:
    check(composed(*RUN, *words))


def test_a_decoder_starts_with_its_discriminator_at_once() -> None:
    check(composed(*RUN, "image_tokenizer.trained_part=decoder", "init_from=a", f"{NAME}.start=0"))


def test_a_resumed_run_compares_what_its_state_depends_on() -> None:
    plain, gan = (settings_of_losses(composed("task=vqvae", *more).image_tokenizer) for more in ((), RUN[1:2]))
    assert plain.keys() == gan.keys()
    assert plain == {**dict.fromkeys(plain), "image_tokenizer.trained_part": "all"}
    assert gan[f"{NAME}.start"] == 1000 and gan[f"{NAME}.norm"] == "group"
