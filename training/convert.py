"""State dicts of the published SOLO models under our names.

Two publishers, one network: the authors' code and mmdetection 3 store the same tensors under
different names of the head. Shapes and values need no change; the backbone has torchvision's
names everywhere.

    authors                     mmdetection                    here
    bbox_head.cate_convs.i      mask_head.cls_convs.i          head.category_convs.i
    bbox_head.ins_convs[_x].i   mask_head.mask_convs[_x].i     head.mask_convs[_x].i
    bbox_head.[d]solo_cate      mask_head.conv_cls             head.category_out
    bbox_head.[d]solo_ins_list  mask_head.conv_mask_list       head.mask_out
    neck.fpn_convs.i.conv       neck.fpn_convs.i.conv          neck.output_convs.i
    neck.lateral_convs.i.conv   neck.lateral_convs.i.conv      neck.lateral_convs.i
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from training.checkpoint import CheckpointError
from training.model.solo import Solo

_RULES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"backbone\.", "backbone."),
        (r"neck\.lateral_convs\.(\d+)\.conv\.", r"neck.lateral_convs.\1."),
        (r"neck\.fpn_convs\.(\d+)\.conv\.", r"neck.output_convs.\1."),
        (r"(?:mask_head\.cls_convs|bbox_head\.cate_convs)\.", "head.category_convs."),
        (r"(?:mask_head\.mask_convs|bbox_head\.ins_convs)(_[xy])?\.", r"head.mask_convs\1."),
        (r"(?:mask_head\.conv_cls|bbox_head\.d?solo_cate)\.", "head.category_out."),
        (
            r"(?:mask_head\.conv_mask_list|bbox_head\.d?solo_ins_list)(_[xy])?\.",
            r"head.mask_out\1.",
        ),
    )
)
_NAMED = 5  # keys that an error message names


def convert_key(key: str) -> str:
    """Our name of a published key.

    Raises:
        CheckpointError: No part of SOLO has such a name in either publication.
    """
    for pattern, ours in _RULES:
        match = pattern.match(key)
        if match:
            return match.expand(ours) + key[match.end() :]
    raise CheckpointError(f"{key!r} is no key of a published SOLO model")


def convert_names(published: Iterable[str], source: str) -> dict[str, str]:
    """The published key of each of our names.

    Raises:
        CheckpointError: Names the first keys that are unknown or doubled.
    """
    theirs: dict[str, str] = {}
    unknown, doubled = [], []
    for key in published:
        try:
            ours = convert_key(key)
        except CheckpointError:
            unknown.append(key)
            continue
        if ours in theirs:
            doubled.append(f"{key} and {theirs[ours]} (both {ours})")
        theirs[ours] = key
    _refuse("keys that no published SOLO model has", unknown, source)
    _refuse("two keys for one weight", doubled, source)
    return theirs


def convert_state_dict(
    published: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Renames a published state dict and checks that nothing is missing or left over.

    Args:
        published: Under the authors' or mmdetection's names.
        expected: State dict of the model to fill; only names and shapes are read, so it may
            live on the meta device.
        source: What to call `published` in an error.

    Returns:
        The same tensors under our names.

    Raises:
        CheckpointError: Names the first keys that are unknown, doubled, missing, left over or
            of another shape; keys of the file by its own names.
    """
    theirs = convert_names(published, source)
    unexpected = [key for ours, key in theirs.items() if ours not in expected]
    missing = [ours for ours in expected if ours not in theirs]
    hint = " (of deformable convolutions that this configuration does not have)"
    _refuse(f"unexpected keys{hint if _have_offsets(unexpected) else ''}", unexpected, source)
    hint = " (of deformable convolutions that the file does not have)"
    _refuse(f"missing keys{hint if _have_offsets(missing) else ''}", missing, source)
    shapes = [
        f"{key} {tuple(published[key].shape)}, expected {tuple(expected[ours].shape)}"
        for ours, key in theirs.items()
        if published[key].shape != expected[ours].shape
    ]
    _refuse("other shapes", shapes, source)
    return {ours: published[key] for ours, key in theirs.items()}


def load_published(model: Solo, published: Mapping[str, Tensor], source: str) -> None:
    """Fills a model with published weights.

    Raises:
        CheckpointError: They do not fit; see `convert_state_dict`.
    """
    model.load_state_dict(convert_state_dict(published, model.state_dict(), source))


def _have_offsets(keys: Iterable[str]) -> bool:
    return any(".conv_offset." in key for key in keys)


def _refuse(what: str, keys: Iterable[str], source: str) -> None:
    listed = list(keys)
    if listed:
        more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        raise CheckpointError(
            f"weights of {source} do not fit, {what}: {', '.join(listed[:_NAMED])}{more}"
        )
