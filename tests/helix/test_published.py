"""The published numbers agree with each other, and what was not published is not there."""

import math

import pytest

from helix.published import PUBLISHED, Published, published

PER_FOLD = [cell for cell in PUBLISHED if cell.per_fold is not None]


def name(cell: Published) -> str:
    return f"{cell.dataset}-{cell.backbone}-{cell.frontend}"


@pytest.mark.parametrize("cell", PER_FOLD, ids=name)
def test_the_per_fold_numbers_of_the_readme_reproduce_table_2(cell: Published):
    assert cell.per_fold is not None and cell.accuracy is not None and cell.std is not None
    mean = sum(cell.per_fold) / len(cell.per_fold)
    variance = sum((value - mean) ** 2 for value in cell.per_fold) / len(cell.per_fold)
    assert mean == pytest.approx(cell.accuracy, abs=5e-7)
    assert math.sqrt(variance) == pytest.approx(cell.std, abs=5.1e-5), "the paper's std divides by n and not by n - 1"


def test_table_2_has_six_cells_of_five_folds_and_100_epochs():
    assert len(PER_FOLD) == 6
    assert {(cell.dataset, cell.folds, cell.epochs, cell.source) for cell in PER_FOLD} == {("esc50", 5, 100, "Table 2")}


@pytest.mark.parametrize("cell", PUBLISHED, ids=name)
def test_every_number_is_a_fraction_with_a_source(cell: Published):
    assert cell.source.startswith("Table")
    assert cell.accuracy is None or 0 < cell.accuracy < 1
    assert cell.last is None or (cell.accuracy is not None and 0 < cell.last <= cell.accuracy)
    assert published(cell.dataset, cell.frontend, cell.backbone) == cell


@pytest.mark.parametrize("dataset", sorted({cell.dataset for cell in PUBLISHED}))
def test_the_variants_of_a_data_set_are_parameter_matched(dataset: str):
    for frontend in ("raw", "mel"):
        counts = [cell.parameters for cell in PUBLISHED if (cell.dataset, cell.frontend) == (dataset, frontend)]
        sizes = [count for count in counts if count is not None]
        assert not sizes or max(sizes) / min(sizes) < 1.001


def test_the_gap_that_the_abstract_names_is_that_of_table_5():
    helix, mamba = published("voxpopuli", "raw", "helix"), published("voxpopuli", "raw", "mamba")
    assert helix is not None and helix.accuracy is not None
    assert mamba is not None and mamba.accuracy is not None
    assert helix.accuracy - mamba.accuracy == pytest.approx(0.115, abs=0.0005)


def test_a_run_that_could_not_be_made_has_a_reason_instead_of_a_number():
    cell = published("voxpopuli", "raw", "attention")
    assert cell is not None
    assert cell.accuracy is None
    assert "memory" in cell.note


@pytest.mark.parametrize("dataset", ["urbansound8k", "librispeech", "tones"])
def test_where_the_paper_gives_no_number_there_is_none(dataset: str):
    assert published(dataset, "raw", "mamba") is None


def test_a_new_backbone_has_no_published_target():
    assert published("esc50", "raw", "hyena") is None
