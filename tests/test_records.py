"""Records: they round-trip, and those that differ in more than they may are refused."""

import math
from dataclasses import replace

import pytest
from benchmark_cases import OURS, record

from peft_talora.benchmark.records import (
    check_record,
    describe_code,
    describe_images,
    read_comparable,
    read_record,
    write_record,
)


def test_a_record_round_trips_and_nan_becomes_none(tmp_path):
    file = tmp_path / "talora-seed0.json"
    write_record(file, record("talora", 0, (0.5, math.nan, 0.4, 0.2)))
    assert read_record(file) == record("talora", 0, (0.5, None, 0.4, 0.2))
    assert read_record(file).validation_loss == 0.75
    assert replace(OURS[0], validation=None).validation_loss == math.inf
    file.write_text("{}")
    with pytest.raises(ValueError, match="no record"):
        read_record(file)


def test_a_record_of_other_arguments_is_refused(tmp_path):
    file = tmp_path / "talora-seed0.json"
    write_record(file, OURS[0])
    check_record(file, {"method": "talora", "seed": 0})
    with pytest.raises(ValueError, match=r"num_train_epochs=10 \(not 3\): .* another `output_dir`"):
        check_record(file, {**OURS[0].arguments, "num_train_epochs": 3})
    with pytest.raises(ValueError, match=r"r=None \(not 4\)"):
        check_record(file, {"r": 4})


def test_records_that_are_not_comparable_do_not_share_a_table(tmp_path):
    files = [tmp_path / f"talora-seed{seed}.json" for seed in (0, 1)]

    def read(**changes):
        for file, one in zip(files, OURS, strict=True):
            write_record(file, one if file is files[0] else replace(one, arguments={**one.arguments, **changes}))
        return read_comparable(files)

    assert read() == OURS
    for changes in ({"num_train_epochs": 3}, {"weight_decay": 0.1}, {"images": "another"}):
        with pytest.raises(ValueError, match=f"are not comparable: {next(iter(changes))}="):
            read(**changes)
    for changes in ({"learning_rate": 3e-3}, {"r": 4}, {"updates": "alternating"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* as another seed of 'talora'"):
            read(**changes)


def test_digests_tell_code_and_images_apart(tmp_path):
    module, image = tmp_path / "peft_talora" / "msam.py", tmp_path / "val" / "image" / "a.jpg"
    for file in (module, image):
        file.parent.mkdir(parents=True)
        file.write_text("a")
    code, images = describe_code(tmp_path), describe_images(tmp_path, ["val"])
    (tmp_path / "README.md").write_text("documents are no code")
    assert (describe_code(tmp_path), describe_images(tmp_path, ["val"])) == (code, images)
    module.write_text("b")
    assert describe_code(tmp_path) != code
    image.rename(image.with_name("b.jpg"))
    assert describe_images(tmp_path, ["val"]) != images
