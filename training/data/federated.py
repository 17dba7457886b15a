"""Which classes of an image are labelled: the fields of LVIS (arXiv 1908.03195, section 3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.model_config import ClassSpec
from training.data.ids import read_whole
from training.data.records import FederatedLabels
from training.data.report import Kind, Problem, shorten

NEGATIVES = "neg_category_ids"
NOT_EXHAUSTIVE = "not_exhaustive_category_ids"


def read_federated(fields: Mapping[str, Any], labels: Mapping[int, int]) -> FederatedLabels | None:
    """The labelled classes of an image; None if these are all.

    Args:
        fields: The image's entry in the annotation file.
        labels: Label of each category id.

    Raises:
        Problem: A field is not a list of listed categories, or the two contradict each other.
    """
    negatives = _read_labels(fields, NEGATIVES, labels)
    not_exhaustive = _read_labels(fields, NOT_EXHAUSTIVE, labels) or frozenset()
    both = not_exhaustive & (negatives or frozenset())
    if both:
        raise Problem(
            Kind.LABELLED_CLASSES,
            f"category {_id_of(min(both), labels)} is in {NEGATIVES} and in {NOT_EXHAUSTIVE}",
        )
    if negatives is None and not not_exhaustive:
        return None
    return FederatedLabels(negatives, not_exhaustive)


def check_negatives(
    federated: FederatedLabels | None, present: Collection[int], labels: Mapping[int, int]
) -> None:
    """Refuses an image with an object of a class that it is said not to have.

    Raises:
        Problem: It has one; names the category.
    """
    if federated is not None and federated.negatives is not None:
        both = federated.negatives.intersection(present)
        if both:
            category_id = _id_of(min(both), labels)
            raise Problem(
                Kind.LABELLED_CLASSES,
                f"it has an object of category {category_id}, which is in {NEGATIVES}",
            )


def format_federated(
    federated: FederatedLabels | None, classes: Sequence[ClassSpec]
) -> dict[str, list[int]]:
    """The fields of an image's entry that `read_federated` reads."""
    if federated is None:
        return {}
    found = {NOT_EXHAUSTIVE: federated.not_exhaustive}
    if federated.negatives is not None:
        found[NEGATIVES] = federated.negatives
    return {
        name: [classes[label].category_id for label in sorted(labels)]
        for name, labels in found.items()
    }


def _read_labels(
    fields: Mapping[str, Any], name: str, labels: Mapping[int, int]
) -> frozenset[int] | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, list):
        raise Problem(Kind.LABELLED_CLASSES, f"{name} is {shorten(value)}, expected a list")
    found = []
    for item in value:
        number = read_whole(item)
        if number is None or number not in labels:
            raise Problem(
                Kind.LABELLED_CLASSES, f"{name} names {shorten(item)}, a category is not listed"
            )
        found.append(labels[number])
    return frozenset(found)


def _id_of(label: int, labels: Mapping[int, int]) -> int:
    return next(category_id for category_id, other in labels.items() if other == label)
