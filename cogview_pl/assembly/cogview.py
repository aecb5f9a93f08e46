"""`CogView`: trained models for use in Python. `task=generate`, `rerank` and `magnify` give the same results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm

from cogview_pl.assembly.checks_in_python import home, new_folder, one_for_each, require_number, required, role_of
from cogview_pl.assembly.guidance import warn_of_guidance
from cogview_pl.assembly.images_in_python import AnyImage, pixels_of, several
from cogview_pl.assembly.pipelines import GenerationPipeline, require_grid, require_same_tokenizer
from cogview_pl.assembly.prompts import read_prompts
from cogview_pl.assembly.roles import CAPTIONER, GENERATOR, UPSCALER, Role
from cogview_pl.assembly.samples import save_sheet
from cogview_pl.checkpoints.adapter_folder import load_adapted
from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.codes import decode_codes, encode_images
from cogview_pl.generation.completion import check_algorithm, is_prefix, known_codes, mask_of, without_the_rest
from cogview_pl.generation.config import CompletionConfig, Quantization, Sampling
from cogview_pl.generation.decode import TO_SAMPLE
from cogview_pl.generation.engine.decode_state import check_sampling
from cogview_pl.generation.engine.forms import keep_forms
from cogview_pl.generation.pipeline import ImageGenerator, pil_images
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.rerank import Captioner
from cogview_pl.generation.super_resolution.consistency import consistent
from cogview_pl.generation.super_resolution.upscale import Upscaler
from cogview_pl.kernels.availability import best_device
from cogview_pl.limits import COUNT, SEED
from cogview_pl.runs.run_folder import predecessor
from cogview_pl.runs.samples_writer import SampleFiles


class RankedImage(NamedTuple):
    """An image and how well its text fits it."""

    image: AnyImage
    caption_loss: float
    """Nats per text token, lower is better."""


class CogView:
    """A generator, a captioner and an upscaler, each of them optional.

    Make it with `load`. Options have the defaults of the command line; the same prompts, seeds and options give the
    same images as there.
    """

    def __init__(
        self,
        generator: SequenceModel | None = None,
        captioner: SequenceModel | None = None,
        upscaler: SequenceModel | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        quantization: Quantization | None = None,
    ) -> None:
        self._tokenizers: dict[Role, ImageTokenizer] = {}
        for role, model in ((GENERATOR, generator), (CAPTIONER, captioner), (UPSCALER, upscaler)):
            if model is None:
                continue
            if generator is not None:
                require_same_tokenizer(role.key, model, generator)
            self._tokenizers[role] = model.image_tokenizer
            model.image_tokenizer.model.to(device)
            model.model.to(dtype)
        self._generator = None if generator is None else ImageGenerator(generator, device)
        if self._generator is not None:
            quantize(self._generator.transformer, quantization)
            keep_forms(self._generator.transformer)
        self._captioner = None if captioner is None else Captioner(captioner, device, dtype, quantization)
        self._upscaler = None if upscaler is None else Upscaler(upscaler, device, dtype, quantization)
        if self._generator is not None and self._upscaler is not None:
            require_grid(self._upscaler, self._generator)
        self._path: Path | None = None

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str | None = None,
        *,
        rerank_with: str | Path | None = None,
        upscale_with: str | Path | None = None,
        outputs: str | Path = "outputs",
        dtype: torch.dtype = torch.float32,
        quantization: Quantization | str | None = None,
        verify: bool = True,
    ) -> CogView:
        """Load models from run, model or adapter folders; `~` is the home folder.

        Args:
            path: a generator, captioner or upscaler, such as `outputs/pretrain/latest`; None: the newest pretrain run.
            device: such as `cuda`; None: the GPU if there is one.
            rerank_with: captioner that ranks the images of `generate`, such as `outputs/caption/latest`.
            upscale_with: model that doubles their edge, such as `outputs/super_resolution/latest`.
            outputs: folder of the runs of all tasks, for `path=None`.
            dtype: precision of the transformers.
            quantization: `int8` or `int4` for the transformers' matrices.
            verify: compare the files with their checksums.

        Raises:
            UserError: a folder is missing, damaged or incomplete, or the models do not fit each other.
        """
        first = predecessor(home(outputs), GENERATOR.task, "path", None if path is None else home(path))
        loaded = load_adapted(first, "path", verify=verify)
        models = {role_of(loaded): loaded}
        for role, given in ((CAPTIONER, rerank_with), (UPSCALER, upscale_with)):
            if given is None:
                continue
            if role in models:
                raise UserError(f"path={first} and {role.key}={given} are models for the same use; give one of them")
            models[role] = load_adapted(predecessor("", role.task, role.key, home(given)), role.key, verify=verify)
            role.require(models[role].template)
        made = cls(
            *(models.get(role) for role in (GENERATOR, CAPTIONER, UPSCALER)),
            device=device or best_device(),
            dtype=dtype,
            quantization=None if quantization is None else Quantization(quantization),
        )
        made._path = first
        return made

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        top_n: int | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        folder: str | Path | None = None,
        font: str | None = None,
        progress: bool = True,
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """Images of one prompt, or a list of images for each of several prompts.

        With a captioner the images of a prompt are ordered by caption loss, best first; with an upscaler their edge is
        doubled. The k-th image of a prompt is sampled with `seed + k` and does not depend on the other prompts.

        Args:
            prompts: a text, or several.
            num_images_per_prompt: images to sample for each prompt.
            top_n: images to keep for each prompt, best first; None: all.
            seed: seed of the first image of each prompt.
            sampling: temperature, top-k and other options; None: the defaults of `Sampling`.
            folder: new or empty folder that gets the images, `samples.jsonl` and a contact sheet (`samples/grid.png`),
                as `task=generate` writes them.
            font: font file for the captions on the contact sheet; None: an installed font with Chinese characters.
            progress: show a progress bar.

        Raises:
            UserError: no generator, a prompt that is too long, an option out of its range, or a folder with files.
        """
        texts = read_prompts([prompts] if isinstance(prompts, str) else list(prompts))
        rows = self._generate(
            texts,
            num_images_per_prompt=num_images_per_prompt,
            top_n=top_n,
            seed=seed,
            sampling=sampling or Sampling(),
            folder=folder,
            font=font,
            progress=progress,
        )
        return rows[0] if isinstance(prompts, str) else rows

    def complete(
        self,
        images: AnyImage | Sequence[AnyImage],
        prompts: str | Sequence[str],
        *,
        keep: str | None = None,
        mask: str | Path | None = None,
        num_images_per_prompt: int = 1,
        top_n: int | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        folder: str | Path | None = None,
        font: str | None = None,
        progress: bool = True,
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """Keep a part of an image and generate the rest; images of one image, or a list of them for each of several.

        The images are resized and cropped to the model's size. Their codes outside the mask stay as they are. Where
        given codes follow generated ones in raster order, the images are ordered by the likelihood of these codes, best
        first; with a captioner by caption loss.

        Args:
            images: an image, or several.
            prompts: their text, or one for each of them.
            keep: what is kept: top, bottom, left, right or border, and its share of the edge, such as `top:0.5`.
            mask: instead of `keep`: an image file of the model's size, or with a pixel for each code; white where
                pixels are generated.
            num_images_per_prompt, top_n, seed, sampling, folder, font, progress: as for `generate`.

        Raises:
            UserError: no generator, an image or mask that cannot be used, another number of prompts, or as `generate`.
        """
        sampling = sampling or Sampling()
        grid = required(self._generator, GENERATOR).grid
        options = CompletionConfig(keep, None if mask is None else home(mask))
        chosen = mask_of(options, grid, self._tokenizers[GENERATOR].settings["image_size"])
        check_algorithm(chosen, sampling)
        pixels = self._pixels(images, GENERATOR)
        texts = read_prompts(one_for_each(prompts, len(pixels)))
        codes = encode_images(pixels, self._tokenizers[GENERATOR].model, sampling.batch_size)
        rows = self._generate(
            texts,
            num_images_per_prompt=num_images_per_prompt,
            top_n=top_n,
            seed=seed,
            sampling=sampling,
            folder=folder,
            font=font,
            progress=progress,
            known=known_codes(codes, chosen),
            shown=[to_pil_image(without_the_rest(image, chosen)) for image in pixels],
        )
        return rows if several(images) else rows[0]

    def _generate(
        self,
        texts: Sequence[str],
        *,
        num_images_per_prompt: int,
        top_n: int | None,
        seed: int,
        sampling: Sampling,
        folder: str | Path | None,
        font: str | None,
        progress: bool,
        known: Tensor | None = None,
        shown: Sequence[Image.Image] = (),
        sources: Tensor | None = None,
    ) -> list[list[Image.Image]]:
        """The images of each text; `shown` come before them on the contact sheet.

        `known`, `sources`: as for `GenerationPipeline.generate`. Images from sources are not ranked by captions.
        """
        generator = required(self._generator, GENERATOR)
        require_number("num_images_per_prompt", num_images_per_prompt, COUNT)
        require_number("seed", seed, SEED)
        if top_n is not None:
            require_number("top_n", top_n, COUNT)
            if known is None or is_prefix(known[0] == TO_SAMPLE):
                required(self._captioner, CAPTIONER)
        check_sampling(generator.transformer, sampling)
        if self._path is not None:
            warn_of_guidance(sampling, self._path)
        generator.tokenise(texts, sources)  # refuses long prompts
        kept = min(top_n or num_images_per_prompt, num_images_per_prompt)
        files = None if folder is None else SampleFiles(new_folder(folder), kept)
        captioner = self._captioner if sources is None else None
        pipeline = GenerationPipeline(generator, captioner, self._upscaler, sampling)
        at_once = max(1, sampling.batch_size // num_images_per_prompt)
        y, x = generator.grid
        codes = y * x if known is None else int((known[0] == TO_SAMPLE).sum())
        images: list[Image.Image] = []
        with tqdm(total=len(texts) * num_images_per_prompt * codes, unit="code", disable=not progress) as bar:
            for start in range(0, len(texts), at_once):
                for sample in pipeline.generate(
                    texts[start : start + at_once],
                    sources=None if sources is None else sources[start : start + at_once],
                    num_images_per_prompt=num_images_per_prompt,
                    top_n=top_n,
                    seed=seed,
                    known=None if known is None else known[start : start + at_once],
                    on_codes=bar.update,
                ):
                    if files is not None:
                        files.write(len(images), sample)
                    images.append(sample.image)
        rows = [images[start : start + kept] for start in range(0, len(images), kept)]
        if files is not None:
            given = [[image] for image in shown] or [[]] * len(rows)
            save_sheet(files.folder, texts, [[*first, *row] for first, row in zip(given, rows, strict=True)], font)
        return rows

    def edit(
        self,
        images: AnyImage | Sequence[AnyImage],
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: bool = True,
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """What a prompt asks to make of one image, or a list for each of several: style transfer, edits. The images
        are resized and cropped to the model's size; an upscaler doubles the edge of the results.

        Args:
            images: an image, or several.
            prompt: the instruction, such as 油画风格.
            num_images_per_prompt, seed, sampling, progress: as for `generate`.

        Raises:
            UserError: the model makes images from texts alone, or an image cannot be read; see also `generate`.
        """
        sampling = sampling or Sampling()
        required(self._generator, GENERATOR)
        codes = self._codes(images, GENERATOR, sampling.batch_size)
        rows = self._generate(
            [prompt] * len(codes),
            num_images_per_prompt=num_images_per_prompt,
            top_n=None,
            seed=seed,
            sampling=sampling,
            folder=None,
            font=None,
            progress=progress,
            sources=codes,
        )
        return rows if several(images) else rows[0]

    def caption(
        self,
        images: AnyImage | Sequence[AnyImage],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: bool = True,
    ) -> str | list[str]:
        """A caption of one image, or captions of several; images are resized and cropped to the model's size.

        Raises:
            UserError: no captioner, or an image that cannot be read.
        """
        sampling, captioner = (sampling or Sampling()).plain(), required(self._captioner, CAPTIONER)
        codes = self._codes(images, CAPTIONER, sampling.batch_size)
        made = captioner.captions(codes, seeds=[seed] * len(codes), sampling=sampling)
        captions = list(tqdm(made, total=len(codes), unit="image", disable=not progress))
        return captions if several(images) else captions[0]

    def rank(self, prompt: str, images: Sequence[AnyImage], *, batch_size: int = 64) -> list[RankedImage]:
        """The images with their caption losses, the one that the prompt fits best first.

        Raises:
            UserError: no captioner, an image that cannot be read, or a prompt that is too long.
        """
        captioner = required(self._captioner, CAPTIONER)
        codes = self._codes(images, CAPTIONER, batch_size)
        losses = captioner.losses([prompt] * len(codes), codes, batch_size)
        ranked = [RankedImage(image, loss) for image, loss in zip(images, losses, strict=True)]
        return sorted(ranked, key=lambda found: found.caption_loss)

    def upscale(
        self,
        images: AnyImage | Sequence[AnyImage],
        prompts: str | Sequence[str] = "",
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: bool = True,
    ) -> Image.Image | list[Image.Image]:
        """The images with twice the edge; before that they are resized and cropped to the model's size.

        Args:
            images: an image, or several.
            prompts: their text, or one for each of them.
            seed: seed of every image.
            sampling: temperature, filters and consistency; None: the defaults of `Sampling`.
            progress: show a progress bar.

        Raises:
            UserError: no upscaler, an image that cannot be read, or another number of prompts.
        """
        sampling, upscaler = (sampling or Sampling()).plain(), required(self._upscaler, UPSCALER)
        small = self._pixels(images, UPSCALER)
        codes = encode_images(small, self._tokenizers[UPSCALER].model, sampling.batch_size)
        texts = one_for_each(prompts, len(codes))
        steps = upscaler.num_steps(len(codes), sampling.batch_size)
        with tqdm(total=steps, unit="window", disable=not progress) as bar:
            seeds = [seed] * len(codes)
            large = upscaler.double(texts, codes, seeds=seeds, sampling=sampling, on_window=lambda: bar.update())
        decoded = decode_codes(large, self._tokenizers[UPSCALER].model, sampling.batch_size)
        found = pil_images(consistent(decoded, torch.stack(small) / 255, sampling.consistency))
        return found if several(images) else found[0]

    def _codes(self, images: AnyImage | Sequence[AnyImage], role: Role, batch_size: int) -> Tensor:
        """Codes `(B, y, x)` of images by the image tokenizer of a role."""
        return encode_images(self._pixels(images, role), self._tokenizers[role].model, batch_size)

    def _pixels(self, images: AnyImage | Sequence[AnyImage], role: Role) -> list[Tensor]:
        """Images of the size that the image tokenizer of a role takes, uint8 `(3, Y, X)`."""
        return pixels_of(images, self._tokenizers[role].settings["image_size"])
