"""Memory of the tasks that use trained models: bytes of each part in each phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cogview_pl.assembly.devices import weights_dtype
from cogview_pl.assembly.model_specs import ImageTokenizerSpec, SequenceModelSpec, role_spec
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.assembly.roles import CAPTION_WRITER, CAPTIONER, EDITOR, GENERATOR, UPSCALER, Role
from cogview_pl.assembly.strategy import tensor_parts
from cogview_pl.generation.config import Algorithm
from cogview_pl.memory.inference import InferenceModel, decode_images, encode_images, image_tokenizer_bytes
from cogview_pl.memory.phases import FP32, RGB, Phases
from cogview_pl.vocab import TextSlot, source_slots


def model_of_role(role: Role, options: GenerationOptions) -> SequenceModelSpec:
    """Sizes and layout of the model that the options name for a role."""
    given, template = {
        GENERATOR: (options.init_from, options.template),
        CAPTION_WRITER: (options.init_from, options.rerank_template),
        EDITOR: (options.init_from, options.template),
        CAPTIONER: (options.rerank_with, options.rerank_template),
        UPSCALER: (options.upscale_with, options.upscale_template),
    }[role]
    return role_spec(role, options.models, given, template)


def generation_phases(role: Role, options: GenerationOptions, prompts: Sequence[str] | int, *, on_gpu: bool) -> Phases:
    """`task=generate`: all models are loaded at once; one of them works.

    Args:
        role: the generator, the writer of captions, or the model that makes images from images.
        options: of the run.
        prompts: the prompts, or their number where the estimate does not read them.
        on_gpu: whether the run is on a GPU.
    """
    model, sampling = _model(role, options, on_gpu), options.sampler
    images, sorts = model.spec.images, sampling.top_p < 1
    if isinstance(model.spec.template.target, TextSlot):
        encoding = encode_images(images, sampling.batch_size)
        decoding = model.decode(sampling.batch_size, sorts=sorts)
        return {"encoding of images": model.held + encoding, "decoding loop": model.held + decoding}
    captioner = None if options.rerank_with is None else _model(CAPTIONER, options, on_gpu)
    upscaler = None if options.upscale_with is None else _model(UPSCALER, options, on_gpu)
    models = [one for one in (model, captioner, upscaler) if one is not None]
    completes = options.complete.wanted
    count, longest = (prompts, None) if isinstance(prompts, int) else (len(prompts), _longest(prompts, model.spec))
    from_images = source_slots(model.spec.template) is not None
    if from_images:
        count = sampling.batch_size  # each image comes with each prompt
    each = options.num_images_per_prompt
    group = min(max(1, sampling.batch_size // each), count)  # prompts whose images are sampled together
    batch = min(sampling.batch_size, each * group)
    scale = 1 if upscaler is None else 2
    held = model.held
    held["sequence_models"] = sum(one.bytes for one in models)
    held["images"] = 0 if on_gpu else group * (options.top_n or each) * RGB * (scale * images.edge) ** 2
    rows = 2 * batch if sampling.guided else batch
    drafts = sampling.drafts if sampling.algorithm == Algorithm.jacobi else 0
    phases = {
        "decoding loop": held
        + model.decode(rows, text_tokens=longest, drafts=drafts, sorts=sorts, completes=completes),
        "decoding of images": held + decode_images(images, batch, scale=scale),
    }
    if from_images:
        phases["encoding of images"] = held + encode_images(images, batch)
    if not on_gpu:  # weights are read in fp32, one model after the other
        read = (one.parameters * FP32 + sum(done.bytes for done in models[:n]) for n, one in enumerate(models))
        phases["loading of weights"] = Counter(sequence_models=max(read))
    if completes:
        phases["encoding of images"] = held + encode_images(images, batch)
    if captioner is not None:
        phases["reranking"] = held + captioner.score(batch)
    if upscaler is not None:
        phases["super-resolution"] = held + upscaler.double(batch, sorts=sorts)
    return phases


def rerank_phases(options: GenerationOptions, *, on_gpu: bool) -> Phases:
    """`task=rerank`: images are encoded, then their texts are scored."""
    model, batch = _model(CAPTIONER, options, on_gpu), options.sampler.batch_size
    encoding = encode_images(model.spec.images, batch)
    return {"encoding of images": model.held + encoding, "reranking": model.held + model.score(batch)}


def magnify_phases(options: GenerationOptions, count: int, *, on_gpu: bool) -> Phases:
    """`task=magnify`: the images of a batch are in main memory, as they are in uint8 and doubled in fp32."""
    model, batch = _model(UPSCALER, options, on_gpu), min(options.sampler.batch_size, count)
    images = model.spec.images
    held = model.held + Counter(images=0 if on_gpu else batch * RGB * images.edge**2 * (1 + 4 * FP32))
    return {
        "encoding of images": held + encode_images(images, batch),
        "super-resolution": held + model.double(batch, sorts=options.sampler.top_p < 1),
        "decoding of images": held + decode_images(images, batch, scale=2),
    }


def tokenize_phases(images: ImageTokenizerSpec, batch: int, *, large: bool) -> Phases:
    """`task=tokenize`; `large`: images have twice the edge."""
    encoding = encode_images(images, batch, scale=2 if large else 1)
    return {"encoding of images": Counter(image_tokenizer=image_tokenizer_bytes(images)) + encoding}


def _model(role: Role, options: GenerationOptions, on_gpu: bool) -> InferenceModel:
    """The model of a role on one device; adapters are merged."""
    return InferenceModel(
        spec=model_of_role(role, options),
        dtype=weights_dtype(options.precision),
        parts=tensor_parts(options.strategy, options.trainer),
        quantization=options.quantization,
        on_gpu=on_gpu,
        engine=options.sampler.engine,
    )


def _longest(prompts: Sequence[str], spec: SequenceModelSpec) -> int | None:
    """Tokens of the longest prompt; None without a text tokenizer."""
    if not prompts or spec.text is None:
        return None
    text = spec.text()
    return max(len(text.encode(prompt)) for prompt in prompts)
