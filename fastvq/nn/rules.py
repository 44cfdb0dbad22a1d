"""Which arguments of `VectorQuantize` go together: what its peer asserts."""

from __future__ import annotations

from torch import nn


def check_rules(
    *,
    heads: int,
    separate_codebook_per_head: bool,
    use_cosine_sim: bool,
    threshold_ema_dead_code: float,
    accept_image_fmap: bool,
    accept_3d_fmap: bool,
    orthogonal_reg_active_codes_only: bool,
    straight_through: bool,
    rotation_trick: bool,
    directional_reparam: bool,
    ema_update: bool,
    vq_bridge: nn.Module | None,
    learnable_codebook: bool,
    affine_param: bool,
    sync_update_v: float,
) -> None:
    """ValueError naming the first argument that another one rules out."""
    separate_heads = separate_codebook_per_head and heads > 1
    for broken, message in (
        (
            straight_through + rotation_trick + directional_reparam > 1,
            "at most one of straight_through, rotation_trick and directional_reparam may be True; got "
            f"{straight_through}, {rotation_trick}, {directional_reparam}",
        ),
        (accept_image_fmap and accept_3d_fmap, "accept_image_fmap=True needs accept_3d_fmap=False; got True"),
        (use_cosine_sim and learnable_codebook, "learnable_codebook=True needs use_cosine_sim=False; got True"),
        (straight_through and learnable_codebook, "learnable_codebook=True needs straight_through=False; got True"),
        (
            ema_update and learnable_codebook,
            "learnable_codebook=True needs ema_update=False: the codes have one teacher; got True",
        ),
        (
            directional_reparam and not threshold_ema_dead_code,
            "directional_reparam=True needs threshold_ema_dead_code above 0; got 0",
        ),
        (
            vq_bridge is not None and not learnable_codebook,
            "vq_bridge needs learnable_codebook=True; got False",
        ),
        (
            sync_update_v > 0 and not learnable_codebook,
            f"sync_update_v={sync_update_v} needs learnable_codebook=True; got False",
        ),
        (affine_param and use_cosine_sim, "affine_param=True needs use_cosine_sim=False; got True"),
        (
            orthogonal_reg_active_codes_only and separate_heads,
            "orthogonal_reg_active_codes_only=True needs separate_codebook_per_head=False; got True",
        ),
    ):
        if broken:
            raise ValueError(message)
