"""Tests of the names of metrics, with and without that of an extractor."""

import pytest

from dmquant.evaluation.reports.columns import METRICS, is_distance, name_metric, sort_key, split_name


@pytest.mark.parametrize(
    "name, kind, extractor",
    [("fid", "fid", ""), ("fd-resnet-cifar10", "fid", "resnet-cifar10"), ("sfd-x", "sfid", "x"), ("kd-x", "kid", "x"),
     ("cs-x", "is", "x"), ("recall-x", "recall", "x"), ("psnr", "psnr", ""), ("odd-x", "odd", "x")],
)  # fmt: skip
def test_a_name_splits_into_metric_and_extractor(name, kind, extractor):
    assert split_name(name) == (kind, extractor)


def test_only_inception_features_keep_the_names_of_the_papers():
    assert (name_metric("fid").title, name_metric("fd-x").title) == ("FID", "FD x")
    assert name_metric("fd-x").better == "lower" and name_metric("cs-x").better == name_metric("is").better == "higher"
    assert name_metric("odd-x").title == "odd-x" and name_metric("odd-x").better == ""


def test_distances_come_first_and_the_unknown_last():
    names = ["odd", "cosine", "psnr", "coverage-x", "kd-x", "sfd-x", "fd-x", "fid"]
    assert sorted(names, key=sort_key) == ["fid", "fd-x", "sfd-x", "kd-x", "coverage-x", "psnr", "cosine", "odd"]
    assert [name for name in names if is_distance(name)] == ["sfd-x", "fd-x", "fid"]
    assert all(column.better for column in METRICS.values())
