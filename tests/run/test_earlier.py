"""Settings of runs by earlier versions."""

from fasttrain.run.earlier import named_now


def test_dino_dropped_paths_before_that_was_an_option() -> None:
    assert named_now({"method": "dino", "arch": "vit_tiny", "vit_patch": 8}) == {
        "method": "dino", "arch": "vit_tiny", "patch_size": 8, "drop_path": 0.1,
    }  # fmt: skip
    for others in ({"method": "moco", "arch": "vit_tiny"}, {"method": "dino", "arch": "resnet18"}):
        assert named_now(others) == others
    chosen = {"method": "dino", "arch": "vit_tiny", "drop_path": 0.2}
    assert named_now(chosen) == chosen


def test_the_similarities_that_runs_kept_were_those_of_projections() -> None:
    assert named_now({"method": "xmoco", "cross": "batch"})["cross_features"] == "projection"
    chosen = {"method": "xmoco", "cross": "batch-within", "cross_features": "encoder"}
    assert named_now(chosen) == chosen
