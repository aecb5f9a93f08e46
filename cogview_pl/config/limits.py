"""Ranges of the numbers in a configuration; what a type cannot say."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from cogview_pl.errors import UserError

_LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("a whole number, at least 1", lambda value: value >= 1 and value % 1 == 0, """
        threads num_prompts num_images_per_prompt num_captions keep sampler.batch_size sampler.drafts
        trainer.max_steps trainer.val_check_interval trainer.accumulate_grad_batches trainer.log_every_n_steps
        callbacks.nan_guard.patience callbacks.checkpoint.every_n_train_steps
        data.batch_size data.train_size data.val_size data.image_size
        features.epochs features.width features.num_features evaluate.resolution evaluate.is_splits
        image_tokenizer.image_size image_tokenizer.grid image_tokenizer.width image_tokenizer.codebook_dim
        image_tokenizer.codebook_size text.vocab_size text.max_length
        model.num_layers model.width model.num_heads model.num_positions"""),
    ("at least 0", lambda value: value >= 0, """
        seed data.num_workers data.min_size image_tokenizer.residual_blocks image_tokenizer.quantize_after_steps
        features.blur features.noise features.tint sampler.temperature sampler.top_k sampler.guidance
        model.init_std lora.rank optimizer.weight_decay optimizer.gradient_clip"""),
    ("at most 4294967295, what random generators take", lambda value: value < 2**32, "seed"),
    ("above 0", lambda value: value > 0, "callbacks.throughput.peak_tflops lora.alpha data.worker_timeout"),
    ("above 0, at most 1", lambda value: 0 < value <= 1, "sampler.top_p text.character_coverage features.lr"),
    ("at least 0, below 1", lambda value: 0 <= value < 1, """
        model.dropout sequences.replay_share sequences.conditioning_dropout sequences.token_noise"""),
    ("between 0 and 1", lambda value: 0 <= value <= 1, """
        data.max_skipped_share data.val_fraction optimizer.warmup optimizer.final_lr"""),
)  # fmt: skip


def check_limits(config: DictConfig) -> None:
    """Refuse numbers that no run could use; raises UserError naming the key.

    What depends on several keys is checked where they meet.
    """
    for wanted, holds, keys in _LIMITS:
        for key in keys.split():
            value = OmegaConf.select(config, key)
            if value is not None and not (isinstance(value, (int, float)) and holds(value)):
                raise UserError(f"{key}={value} must be {wanted}")
