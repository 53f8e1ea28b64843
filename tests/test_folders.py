"""Folders as people bring them: what is read of them, what is skipped and said, and what of it a network is fed with later."""

import json
import os
import re
import shutil
import struct
import zlib
from types import SimpleNamespace

import common
import cw_rgp
import eval as evaluation
import numpy as np
import pytest
import torch
from conftest import draw_image, is_one_line_error, make_folder, run_here, write_image
from PIL import Image

CPU = torch.device("cpu")
STREAM = ["--stream", "--num-workers", "0"]
BOTH = pytest.mark.parametrize("more", [[], STREAM], ids=["memory", "stream"])


def load(root, *argv):
    """The folder as Data, in batches of 2."""
    args = cw_rgp.parse_args(["--batch-size", "2", "--w-size", "2", "--dataset", "folder", "--data-dir", str(root), *map(str, argv)])
    return common.load_data(args, CPU)


def refusal(root, *argv):
    """The one line with which the folder is refused."""
    with pytest.raises(common.UserError) as raised:
        load(root, *argv)
    message = str(raised.value)
    assert "\n" not in message and str(root) in message
    return message


def fill(folder, count=4, side=16, kind="png", first=0):
    """Different images 0.png, 1.png, ... in a folder."""
    for i in range(first, first + count):
        write_image(folder / f"{i}.{kind}", draw_image(np.random.default_rng(zlib.crc32(str(folder / str(i)).encode())), 0, side))


def fill_all(root, *names, **settings):
    for name in names:
        fill(root / name, **settings)
    return root


def first_line(capsys):
    return capsys.readouterr().out.splitlines()[0]


def pixels(data, i=0):
    """Image i of the training images in memory: [H, W, 3]."""
    return data.train[i].permute(1, 2, 0).numpy()


# ---- 1. The first line ---------------------------------------------------------------------------


@BOTH
def test_the_first_line_says_what_was_found_and_skipped(tmp_path, capsys, more):
    fill_all(tmp_path / "train", "a", "b", count=20, side=32)
    fill_all(tmp_path / "test", "a", "b", count=8, side=32)
    for name in ("x.png", "y.jpg", "z.tif"):
        (tmp_path / "train" / "a" / name).write_bytes(b"no image")
    for name in ("1.gif", "2.GIF"):
        (tmp_path / "train" / "b" / name).write_bytes(b"GIF89a")
    write_image(tmp_path / "test" / "b" / "small.png", np.zeros((7, 30, 3), np.uint8))
    load(tmp_path, *more)
    assert first_line(capsys) == ("40 training images in 2 classes, 16 test images (test/), 32x32; skipped: 3 unreadable, "
                                  "2 of a kind that is not read (.gif), 1 smaller than 8x8")


def test_the_first_line_of_patterns(capsys, monkeypatch):
    small = common.make_patterns(0, 200, 40)
    monkeypatch.setattr(common, "make_patterns", lambda: small)
    common.load_data(cw_rgp.parse_args(["--batch-size", "64"]), CPU)
    assert first_line(capsys) == "200 training images in 10 classes, 40 test images, 32x32"


@BOTH
def test_train_images_takes_evenly_spaced_ones_and_measures_on_all(tmp_path, capsys, more):
    fill_all(tmp_path / "train", "a", "b", "c", count=8)
    fill_all(tmp_path / "test", "a", "b", "c", count=2)
    whole, few = load(tmp_path, *more), load(tmp_path, "--train-images", 6, *more)
    assert first_line(capsys).startswith("24 training images in 3 classes, 6 test images")
    load(tmp_path, "--train-images", 6, *more)
    assert capsys.readouterr().out.splitlines()[-1].startswith("6 of 24 training images in 3 classes, 6 test images")
    every = torch.cat(list(whole.eval_views(whole.train, torch.arange(24), 24)))
    taken = torch.cat(list(few.eval_views(few.train, torch.arange(len(few.train)), 24)))
    torch.testing.assert_close(taken, every[[0, 4, 9, 13, 18, 23]], rtol=0, atol=0)
    assert few.steps_per_epoch == 3 and few.statistics == whole.statistics and few.fingerprint == whole.fingerprint
    assert len(few.bank) == len(few.bank_labels) == len(few.labelled_train) == 24
    for epoch in range(2):
        batches = list(few.batches(epoch))
        assert len(batches) == 3
        if not more:
            drawn = torch.cat(batches).flatten(1)
            torch.testing.assert_close(drawn.sort(0).values, few.train.flatten(1).sort(0).values)
    assert len(load(tmp_path, "--train-images", 99, *more).train) == 24


def test_too_few_train_images_for_a_batch_are_one_line(tmp_path):
    fill(tmp_path, 12)
    with pytest.raises(common.UserError, match="must be at most 4, the training images; try --batch-size 4"):
        load(tmp_path, "--train-images", 4, "--batch-size", 8)


@BOTH
def test_the_size_of_views_is_the_median_and_not_that_of_the_first_file(tmp_path, capsys, more):
    fill(tmp_path, 1, 9)
    fill(tmp_path, 9, 200, first=1)
    data = load(tmp_path, *more)
    assert data.size == 64 and data.statistics["size"] == 64
    assert first_line(capsys) == "10 training images without labels, no test images, 64x64 (median of sides 9 to 200)"


def test_one_huge_picture_among_icons_does_not_set_the_size_of_views(tmp_path):
    fill(tmp_path, 9, 20, first=1)
    fill(tmp_path, 1, 300)
    assert load(tmp_path).size == 20


@BOTH
def test_truncated_files_are_unreadable_in_memory_and_when_streaming_alike(tmp_path, capsys, more):
    fill(tmp_path, 7, 32)
    path = tmp_path / "3.png"
    path.write_bytes(path.read_bytes()[:-500])
    data = load(tmp_path, *more)
    assert len(data.train) == 6 and "; skipped: 1 unreadable" in first_line(capsys)


def test_memory_and_stream_agree_on_everything(tmp_path, capsys):
    fill_all(tmp_path, "a", "b", "c", count=10, side=24)
    (tmp_path / "a" / "3.png").write_bytes(b"broken")
    path = tmp_path / "b" / "4.png"
    path.write_bytes(path.read_bytes()[:-300])
    write_image(tmp_path / "c" / "5.png", np.zeros((5, 5, 3), np.uint8))
    memory, stream = load(tmp_path), load(tmp_path, *STREAM)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] and memory.fingerprint == stream.fingerprint and memory.statistics == stream.statistics
    assert memory.train_labels.tolist() == stream.train_labels.tolist() and memory.test_labels.tolist() == stream.test_labels.tolist()
    for part in ("train", "test"):
        images = [common.read_image(path) for path in getattr(stream, part).paths]
        assert torch.equal(getattr(memory, part), torch.stack(images))


# ---- 2. Folders: splits --------------------------------------------------------------------------


@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("train", "valid"),
                                         ("Training", "Validation"), ("train", "val")])
def test_splits_by_their_usual_names_in_any_case(tmp_path, capsys, train, test):
    fill_all(tmp_path / train, "a", "b", count=3)
    fill_all(tmp_path / test, "a", "b", count=2)
    data = load(tmp_path)
    assert len(data.train) == 6 and data.test_labels.tolist() == [0, 0, 1, 1] and data.class_names == ["a", "b"]
    assert f"4 test images ({test}/)" in first_line(capsys)


def test_a_class_called_train_is_a_class(tmp_path, capsys):
    fill_all(tmp_path, "bus", "car", "train", count=13)
    data = load(tmp_path)
    assert data.class_names == ["bus", "car", "train"] and len(data.train) + len(data.test) == 39
    assert "in 3 classes" in first_line(capsys)


def test_classes_called_train_and_test_inside_of_train_are_classes(tmp_path):
    fill_all(tmp_path / "train", "train", "test", "car")
    assert load(tmp_path).class_names == ["car", "test", "train"]


@pytest.mark.parametrize("names", [("train", "test", "extra"), ("train", "val", "bus"), ("test", "car"), ("test", "val"), ("Train", "train"),
                                   ("train2017", "val2017"), ("training_set", "test_set"), ("seg_train", "seg_test", "seg_pred"),
                                   ("train_images", "test_images")])
def test_what_may_be_splits_or_classes_is_refused_with_both_readings(tmp_path, names):
    fill_all(tmp_path, *names)
    message = refusal(tmp_path)
    assert names[0] in message and "training and test images or classes" in message and f"into {tmp_path}/train" in message


def test_the_remedy_for_an_ambiguous_folder_works(tmp_path):
    fill_all(tmp_path, "train", "test", "bus")
    refusal(tmp_path)
    fill_all(tmp_path / "train", "moved")  # as the message says: all folders into train
    shutil.rmtree(tmp_path / "train")
    fill_all(tmp_path / "train", "train", "test", "bus")
    shutil.rmtree(tmp_path / "test"), shutil.rmtree(tmp_path / "bus")
    assert load(tmp_path).class_names == ["bus", "test", "train"]


def test_a_train_folder_with_classes_beside_another_folder_is_refused(tmp_path):
    fill_all(tmp_path / "train", "a", "b")
    fill(tmp_path / "extra")
    assert "train may be training and test images" in refusal(tmp_path)


def test_words_that_only_contain_train_are_classes(tmp_path):
    fill_all(tmp_path, "trainer", "test_tube", "restraint", "interval")
    assert load(tmp_path).class_names == ["interval", "restraint", "test_tube", "trainer"]


def test_val_is_counted_as_skipped_where_test_is_there(tmp_path, capsys):
    for split in ("train", "test", "val"):
        fill_all(tmp_path / split, "a", "b")
    assert len(load(tmp_path).test) == 8
    assert first_line(capsys).endswith("8 test images (test/), 16x16; skipped: 8 in val/")


def test_a_labelled_val_comes_before_a_test_without_labels(tmp_path, capsys):
    """Kaggle's layout: the labels of test are secret."""
    fill_all(tmp_path / "train", "a", "b")
    fill_all(tmp_path / "val", "a", "b", count=3)
    fill(tmp_path / "test", 5)
    data = load(tmp_path)
    assert data.labelled and data.test_labels.tolist() == [0] * 3 + [1] * 3
    assert "6 test images (val/), 16x16; skipped: 5 in test/" in first_line(capsys)


def test_with_a_test_folder_without_labels_training_images_are_held_out(tmp_path, capsys):
    fill_all(tmp_path / "train", "a", "b", count=10)
    fill(tmp_path / "test", 5)
    data = load(tmp_path)
    assert data.labelled and data.test_labels.tolist() == [0, 0, 1, 1] and len(data.train) == 16
    assert "skipped: 5 in test/" in first_line(capsys)
    assert len(load(tmp_path, "--test-fraction", 0).test) == 5
    fill_all(tmp_path / "val", "a", "b", count=3)  # with labels, it goes before test, whatever the fraction
    for fraction in (0, 0.2):
        data = load(tmp_path, "--test-fraction", fraction)
        assert data.labelled and len(data.test) == 6 and len(data.train) == 20


def test_training_images_without_labels_beside_test_classes(tmp_path):
    fill(tmp_path / "train", 6)
    fill_all(tmp_path / "test", "a", "b", count=2)
    data = load(tmp_path)
    assert data.train_labels is None and data.test_labels is None and len(data.train) == 6 and len(data.test) == 4


def test_a_class_only_in_test_is_refused_and_one_only_in_train_is_not(tmp_path):
    fill_all(tmp_path / "train", "a", "b")
    fill_all(tmp_path / "test", "a")
    assert load(tmp_path).test_labels.tolist() == [0] * 4
    fill_all(tmp_path / "test", "odd\nname")
    assert "odd\\nname" in refusal(tmp_path) and "no counterpart" in refusal(tmp_path)


def test_images_beside_the_splits_are_counted(tmp_path, capsys):
    fill_all(tmp_path / "train", "a", "b")
    fill_all(tmp_path / "test", "a", "b")
    fill(tmp_path, 2)
    assert len(load(tmp_path).train) == 8 and "skipped: 2 beside the splits" in first_line(capsys)


# ---- 2. Folders: classes -------------------------------------------------------------------------


@BOTH
def test_class_folders_without_a_test_set_hold_out_a_share_of_each_class(tmp_path, capsys, more):
    fill_all(tmp_path, "cat", "dog", count=20)
    fill(tmp_path / "rare", 3)
    data = load(tmp_path, *more)
    assert data.labelled and torch.bincount(data.test_labels).tolist() == [4, 4, 1] and torch.bincount(data.train_labels).tolist() == [16, 16, 2]
    assert first_line(capsys) == "34 training images in 3 classes, 9 test images (held out: --test-fraction 0.2), 16x16"


def held_out(root, *argv):
    data = load(root, *STREAM, *argv)
    train, test = set(data.train.paths), set(data.test.paths)
    assert not train & test and len(train) + len(test) == 40
    return test


def test_the_held_out_images_follow_from_the_seed_and_are_never_trained_on(tmp_path):
    fill_all(tmp_path, "cat", "dog", count=20)
    first = held_out(tmp_path)
    assert first == held_out(tmp_path) and len(first) == 8
    assert first != held_out(tmp_path, "--seed", 1)
    assert len(held_out(tmp_path, "--test-fraction", 0.5)) == 20
    assert [path for path in sorted(first)] != sorted(str(tmp_path / c / f"{i}.png") for c in ("cat", "dog") for i in range(4))  # drawn


def test_without_a_hold_out_all_images_are_trained_on(tmp_path, capsys):
    fill_all(tmp_path, "cat", "dog", count=20)
    data = load(tmp_path, "--test-fraction", 0)
    assert len(data.train) == 40 and not data.labelled and "no test images" in first_line(capsys)


def test_a_class_of_one_image_is_trained_on(tmp_path):
    fill_all(tmp_path, "a", "b", count=5)
    fill(tmp_path / "single", 1)
    data = load(tmp_path, "--test-fraction", 0.9)
    assert torch.bincount(data.train_labels).tolist() == [1, 1, 1] and torch.bincount(data.test_labels).tolist() == [4, 4]


def test_train_without_test_holds_out_too(tmp_path):
    fill_all(tmp_path / "train", "a", "b", count=5)
    assert load(tmp_path).test_labels.tolist() == [0, 1]


@pytest.mark.parametrize("value", ["-0.1", "1", "1.5", "nan", "x"])
def test_a_test_fraction_out_of_bounds_is_one_line(tmp_path, value):
    fill_all(tmp_path, "a", "b")
    result = run_here("cw_rgp", ["--dataset", "folder", "--data-dir", tmp_path, f"--test-fraction={value}"])
    assert is_one_line_error(result) and "--test-fraction" in result.err and "try 0.2" in result.err


def test_a_stray_image_beside_class_folders_keeps_the_labels_of_the_others(tmp_path, capsys):
    fill_all(tmp_path, "cat", "dog", count=10)
    fill(tmp_path, 1)
    data = load(tmp_path)
    assert data.labelled and data.class_names == ["cat", "dog"] and len(data.train) + len(data.test) == 20
    assert "skipped: 1 beside the class folders" in first_line(capsys)


def test_many_images_beside_folders_are_refused(tmp_path):
    fill_all(tmp_path, "cat", "dog", count=3)
    fill(tmp_path, 6)
    assert "6 images lie beside the folders of 6 others" in refusal(tmp_path)


def test_images_beside_one_folder_have_no_labels(tmp_path, capsys):
    fill(tmp_path, 6)
    fill(tmp_path / "more", 3)
    assert len(load(tmp_path).train) == 9 and "9 training images without labels" in first_line(capsys)


@pytest.mark.parametrize("name", ["__MACOSX", ".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN", ".git", ".thumbnails", "System Volume Information",
                                  "#recycle", "__pycache__", "lost+found", ".Trash-1000"])
def test_folders_that_tools_leave_are_no_classes(tmp_path, capsys, name):
    fill_all(tmp_path, "cat", "dog", name, f"cat/{name}")
    data = load(tmp_path, "--test-fraction", 0)
    assert data.class_names == ["cat", "dog"] and len(data.train) == 8 and "skipped" not in first_line(capsys)


def test_a_folder_that_lies_below_a_hidden_one_is_read(tmp_path):
    fill_all(tmp_path / ".cache" / "__MACOSX", "cat", "dog")
    assert load(tmp_path / ".cache" / "__MACOSX").class_names == ["cat", "dog"]


def test_nested_class_folders_belong_to_the_class_at_the_top(tmp_path):
    fill_all(tmp_path, "cat/2020/may", "cat/2021", "dog/x")
    data = load(tmp_path, "--test-fraction", 0)
    assert data.class_names == ["cat", "dog"] and data.train_labels.tolist() == [0] * 8 + [1] * 4


def test_an_empty_folder_is_no_class(tmp_path, capsys):
    fill_all(tmp_path, "cat", "dog")
    (tmp_path / "bird").mkdir()
    assert load(tmp_path).class_names == ["cat", "dog"] and "in 2 classes" in first_line(capsys)


def test_one_class_is_refused_with_the_folder_to_try(tmp_path):
    fill_all(tmp_path / "dataset" / "images", "cat", "dog")
    assert refusal(tmp_path).endswith(f"try --data-dir {tmp_path}/dataset")
    assert refusal(tmp_path / "dataset").endswith(f"try --data-dir {tmp_path}/dataset/images")
    assert load(tmp_path / "dataset" / "images").class_names == ["cat", "dog"]


def test_upper_case_endings_and_odd_names_are_read(tmp_path):
    for folder in ("ein Ordner", "日本", "new\nline"):
        fill(tmp_path / folder, 2)
    for old, new in (("0.png", "A B.PNG"), ("1.png", "ü\n漢.Png")):
        (tmp_path / "日本" / old).rename(tmp_path / "日本" / new)
    data = load(tmp_path)
    assert data.class_names == ["ein Ordner", "new\nline", "日本"] and len(data.train) + len(data.test) == 6


def test_a_broken_file_with_a_line_break_in_its_name_is_named_on_one_line(tmp_path, capsys):
    fill_all(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "a\nb\udcff.png").write_bytes(b"broken")
    load(tmp_path)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "a\\nb\\udcff.png" in err


def test_names_that_are_not_utf_8_train_and_are_kept(tmp_path):
    for folder in (b"caf\xe9", b"th\xe9"):
        (tmp_path / os.fsdecode(folder)).mkdir()
        for i in range(16):
            fill(tmp_path, 1, first=i)
            (tmp_path / f"{i}.png").rename(tmp_path / os.fsdecode(folder) / f"{i}.png")
    result, run = small_run(tmp_path, tmp_path.parent / f"{tmp_path.name}-run")
    assert result.status == 0, result.err
    assert torch.load(run / "last.pt", weights_only=True)["data_statistics"]["class_names"] == ["caf\udce9", "th\udce9"]


def test_kinds_that_are_not_read_are_counted_by_kind(tmp_path, capsys):
    fill_all(tmp_path, "cat", "dog")
    for name in ("1.heic", "2.HEIC", "3.avif", "scan", "train.csv"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    load(tmp_path)
    line = first_line(capsys)
    assert "skipped: 2 of a kind that is not read (.heic), " in line
    for kind in (".avif", "no extension", ".csv"):
        assert f"1 of a kind that is not read ({kind})" in line


def test_a_folder_of_unread_kinds_only_says_which(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.heic").write_bytes(b"x")
    assert "no images" in refusal(tmp_path) and "3 of a kind that is not read (.heic)" in refusal(tmp_path)


# ---- 2. Folders: links, pipes --------------------------------------------------------------------


def test_symlink_loops_are_read_once(tmp_path, capsys):
    root = fill_all(tmp_path / "data", "cat", "dog", count=12)
    (root / "cat" / "up").symlink_to(root)
    (root / "dog" / "self").symlink_to(".")
    (root / "dog" / "out").symlink_to(tmp_path)  # of which the folder is a part
    (root / "loop").symlink_to("loop")
    fill(tmp_path, 3)
    data = load(root, "--test-fraction", 0)
    assert len(data.train) == 24 and "3 link(s) to a folder that is read already" in first_line(capsys)


def test_linked_classes_are_read_and_a_folder_keeps_its_own_name(tmp_path):
    fill_all(tmp_path / "pool", "cat", "dog")
    root = tmp_path / "data"
    fill(root / "zebra")
    for name in ("cat", "dog"):
        (root / name).symlink_to(tmp_path / "pool" / name)
    (root / "alias").symlink_to(root / "zebra")
    fill(root / "cat2" / "x")
    (root / "bird").symlink_to(root / "cat2" / "x")
    assert load(root).class_names == ["cat", "cat2", "dog", "zebra"]


@pytest.mark.parametrize("more", [[], STREAM], ids=["memory", "stream"])
def test_only_regular_files_are_opened(tmp_path, capsys, more):
    fill_all(tmp_path, "cat", "dog")
    os.mkfifo(tmp_path / "cat" / "x.png")
    os.mkfifo(tmp_path / "dog" / "labels.csv")
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "dog" / "linked.png").symlink_to("0.png")
    (tmp_path / "dog" / "folder.png").mkdir()
    fill(tmp_path / "dog" / "folder.png", 1)
    data = load(tmp_path, "--test-fraction", 0, *more)
    assert len(data.train) == 10 and "skipped: 2 not a regular file" in first_line(capsys)


def test_splits_inside_the_class_folders_are_refused(tmp_path):
    for name in ("a", "b"):
        fill_all(tmp_path / name, "Train", "test")
    assert "train and test lie inside the class folders; move them up, as train/<class>" in refusal(tmp_path)
    fill_all(tmp_path / "ok" / "a", "train", "trains")  # of one kind, no split
    fill_all(tmp_path / "ok" / "b", "train")
    assert load(tmp_path / "ok").class_names == ["a", "b"]


@BOTH
def test_a_class_whose_training_images_cannot_be_read_is_named(tmp_path, capsys, more):
    fill_all(tmp_path / "train", "a", "b", "c")
    fill_all(tmp_path / "test", "a", "b", "c", count=2)
    for path in (tmp_path / "train" / "c").iterdir():
        path.write_bytes(b"no image")
    assert load(tmp_path, *more).class_names == ["a", "b", "c"]
    assert "no training image of c can be read: its test images count as errors" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "test" / "c")
    assert load(tmp_path, *more).class_names == ["a", "b"]
    assert "no training image" not in capsys.readouterr().err


def test_classes_of_test_images_alone_are_said_to_be_unused(tmp_path, capsys):
    fill(tmp_path / "train")
    fill_all(tmp_path / "test", "a", "b")
    assert not load(tmp_path).labelled
    assert f"the classes of the test images are not used: the images in {tmp_path / 'train'} have none" in capsys.readouterr().err


def test_one_image_of_each_class_leaves_nothing_to_hold_out(tmp_path, capsys):
    fill_all(tmp_path, "a", "b", count=1)
    assert len(load(tmp_path).train) == 2
    assert first_line(capsys) == "2 training images in 2 classes, no test images, 16x16"


@pytest.mark.parametrize("name", ["Labels.csv", "LABELS.CSV"])
def test_another_spelling_of_labels_csv_is_counted(tmp_path, capsys, name):
    fill(tmp_path)
    (tmp_path / name).write_text("file,label\n")
    load(tmp_path)
    assert "skipped: 1 of a kind that is not read (.csv)" in first_line(capsys)


@pytest.mark.parametrize("folder", ["a", "a/deep"])
def test_a_labels_csv_that_is_not_read_is_named(tmp_path, capsys, folder):
    fill_all(tmp_path, "a", "a/deep", "b")
    (tmp_path / folder / "labels.csv").write_text("file,label\n0.png,malignant\n")
    data = load(tmp_path)
    assert data.class_names == ["a", "b"]
    assert capsys.readouterr().err == f"{tmp_path / folder / 'labels.csv'} is not read; put one labels.csv into {tmp_path}\n"


def test_a_bmp_of_16_bits_a_pixel_is_read(tmp_path):
    """Pillow calls its pixels BGR;16: 5, 6 and 5 bits for a colour, not 16."""
    fill_all(tmp_path, "a", "b")
    header = struct.pack("<2sIHHI", b"BM", 66 + 512, 0, 0, 66) + struct.pack("<IiiHHIIiiII", 40, 16, 16, 1, 16, 3, 512, 0, 0, 0, 0)
    colours = np.arange(256, dtype="<u2") * 255
    (tmp_path / "a" / "5.bmp").write_bytes(header + struct.pack("<III", 0xF800, 0x07E0, 0x001F) + colours.tobytes())
    data = load(tmp_path, "--test-fraction", 0, "--image-size", 16)
    mine = data.files[0].index(os.path.join("a", "5.bmp"))
    red = colours.reshape(16, 16)[::-1] >> 11
    assert len(data.train) == 9 and np.abs(pixels(data, mine)[..., 0] / 255 - red / 31).max() < 0.01


# ---- 2. Folders: labels.csv ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["file,label\n0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog\n",
                                  "\ufefffile,label\r\n0.png,cat\r\n1.png,dog\r\n2.png,cat\r\n3.png,dog\r\n",
                                  "file,label\n0.png,cat\n1.png,dog\n\n./2.png,cat\n 3.png , dog \n",
                                  'file,label\n"0.png","cat"\n1.png,dog\n2.png,cat\n3.png,dog'])
def test_labels_csv_gives_the_classes(tmp_path, capsys, text):
    fill(tmp_path)
    (tmp_path / "labels.csv").write_bytes(text.encode())
    data = load(tmp_path, "--test-fraction", 0)
    assert data.class_names == ["cat", "dog"] and data.train_labels.tolist() == [0, 1, 0, 1]
    assert first_line(capsys) == "4 training images in 2 classes, no test images, 16x16"


def test_labels_csv_of_each_split_and_of_folders_below(tmp_path):
    fill_all(tmp_path, "train/x", "test", count=4)
    (tmp_path / "train" / "labels.csv").write_text("file,label\n" + "".join(f"x\\{i}.png,{'ab'[i % 2]}\n" for i in range(4)))
    (tmp_path / "test" / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,b\n" for i in range(3)))
    data = load(tmp_path)
    assert data.train_labels.tolist() == [0, 1, 0, 1] and data.test_labels.tolist() == [1, 1, 1]


def test_one_labels_csv_for_both_splits(tmp_path):
    fill_all(tmp_path, "train", "test", count=2)
    (tmp_path / "labels.csv").write_text("file,label\ntrain/0.png,a\ntrain/1.png,b\ntest/0.png,b\ntest/1.png,a\n")
    data = load(tmp_path)
    assert data.train_labels.tolist() == [0, 1] and data.test_labels.tolist() == [1, 0]


def test_labels_csv_comes_before_class_folders_and_images_without_a_line_are_counted(tmp_path, capsys):
    fill_all(tmp_path, "x", "y", count=3)
    (tmp_path / "labels.csv").write_text("file,label\nx/0.png,cat\nx/1.png,dog\ny/0.png,cat\ny/2.png,dog\n")
    data = load(tmp_path, "--test-fraction", 0)
    assert data.class_names == ["cat", "dog"] and data.train_labels.tolist() == [0, 1, 0, 1]
    assert "skipped: 2 not in labels.csv" in first_line(capsys)


def test_labels_of_numbers_and_of_unreadable_files(tmp_path, capsys):
    fill(tmp_path, 4)
    for name in ("4.gif", "5.png"):
        (tmp_path / name).write_bytes(b"broken")
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.{'gif' if i == 4 else 'png'},{i % 2 + 7}\n" for i in range(6)))
    data = load(tmp_path, "--test-fraction", 0)
    assert data.class_names == ["7", "8"] and data.train_labels.tolist() == [0, 1, 0, 1] and "1 unreadable" in first_line(capsys)


@pytest.mark.parametrize("text, part", [
    (b"file,label\n0.png,cat\nmissing.png,dog\n", "labels.csv, line 3: 'missing.png,dog': no such file"),
    (b"file,label\n0.png,cat\n1.png,cat\n0.png,dog\n", "labels.csv, line 4: '0.png,dog': no such file, a second label for it"),
    (b"file,label\n0.png,cat\n./0.png,dog\n", "labels.csv, line 3"),
    (b"file,label\n\n1.png\n", "line 3: '1.png': no such file"),
    (b"file,label\n0.png,cat\n1.png,\n", "line 3: '1.png,': no such file"),
    (b"file,label\n0.png,cat\n1.png,a,b\n", "line 3: '1.png,a,b': no such file"),
    (b"file,label,split\n0.png,cat,train\n", "the first line is 'file,label,split' and should be file,label"),
    (b"file;label\n0.png;cat\n", "the first line is 'file;label'"),
    (b"0.png,cat\n1.png,dog\n", "the first line is '0.png,cat'"),
    (b"filename,class\n0.png,cat\n", "the first line is 'filename,class'"),
    (b"file,file\n0.png,cat\n", "the first line is 'file,file'"),
    (b"", "the first line is ''"),
    (b"file,label\n", "no images"),
    (b"file,label\n0.png,caf\xe9\n", "save it as UTF-8"),
    ("file,label\n0.png,cat\n".encode("utf-16"), "save it as UTF-8"),
    (b'file,label\n"0.png,cat\n1.png,dog\n', "labels.csv"),
    (b"file,label\n0.png,cat\n1.png,cat\n", "only one class"),
    (b"file,label\n../other.png,cat\n", "line 2"),
])
def test_a_wrong_labels_csv_is_one_line(tmp_path, text, part):
    fill(tmp_path)
    (tmp_path / "labels.csv").write_bytes(text)
    assert part in refusal(tmp_path)


# ---- 3. Pixels: more than 8 bits -----------------------------------------------------------------


def ramp(low, high, side=16):
    """[side, side]: from low to high, row by row."""
    return np.linspace(low, high, side * side).reshape(side, side)


def save_deep(root, low, high, dtype, kind="tif", count=4):
    """Images whose values fill low ... high together, and each a part of it. -> the arrays"""
    root.mkdir(parents=True, exist_ok=True)
    edges, arrays = np.linspace(low, high, count + 1), []
    for i in range(count):
        arrays.append(ramp(edges[i], edges[i + 1]).astype(dtype))
        Image.fromarray(arrays[-1]).save(root / f"{i}.{kind}")
    return arrays


@BOTH
@pytest.mark.parametrize("low, high, dtype, kind, words", [
    (0, 1, np.float32, "tif", "floats"), (0, 255, np.int32, "tif", "32 bits"), (0, 4095, np.uint16, "tif", "16 bits"),
    (0, 4095, np.uint16, "png", "16 bits"), (-1024, 3071, np.int32, "tiff", "32 bits"), (0, 65535, np.uint16, "png", "16 bits"),
    (-3.5, 80.25, np.float32, "tif", "floats"), (1e-6, 2e-6, np.float32, "tif", "floats"), (270.1, 310.7, np.float32, "tif", "floats"),
    (100_000, 3_000_000, np.int32, "tif", "32 bits"), (0, 1, np.int32, "tif", "32 bits")])
def test_files_of_more_than_8_bits_fill_8_bits_by_one_scale(tmp_path, capsys, low, high, dtype, kind, words, more):
    arrays = save_deep(tmp_path, low, high, dtype, kind)
    data = load(tmp_path, *more)
    line = first_line(capsys)
    assert f"; {words}: {data.statistics['scale'][1]:g} ... {data.statistics['scale'][2]:g} became 0 ... 255" in line
    assert data.statistics["scale"] == [words, pytest.approx(low, abs=0.01 * (high - low)), pytest.approx(high, abs=0.01 * (high - low))]
    for i, array in enumerate(arrays):
        image = data.train[i] if not more else common.read_image(data.train.paths[i], data.train.scale)
        expected = (array.astype(np.float64) - low) / (high - low) * 255
        assert all(np.abs(channel - expected).max() < 2 for channel in image.numpy().astype(float))


def png_16(array):
    """A PNG of 16 bits, [H, W] or [H, W, 2 ... 4], which Pillow cannot write."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = array.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_16(array, compress=False, order="<"):
    """A TIFF of 16-bit colours, [H, W, 3 or 4]."""
    height, width, channels = array.shape
    content = array.astype(f"{order}u2").tobytes()
    if compress:
        content = zlib.compress(content)
    tags = [(256, width), (257, height), (258, None), (259, 8 if compress else 1), (262, 2), (273, None), (277, channels), (278, height),
            (279, len(content)), (284, 1)] + ([(338, 2)] if channels == 4 else [])
    end = 8 + 2 + 12 * len(tags) + 4
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, value in tags:
        if tag == 258:
            out += struct.pack(f"{order}HHII", tag, 3, channels, end)
        else:
            out += struct.pack(f"{order}HHII", tag, 4, 1, end + 2 * channels if tag == 273 else value)
    return out + struct.pack(f"{order}I", 0) + struct.pack(f"{order}{channels}H", *[16] * channels) + content


@pytest.mark.parametrize("make, kind", [(png_16, "png"), (tiff_16, "tif")])
def test_the_scale_is_that_of_the_colours_without_alpha(tmp_path, make, kind):
    rng = np.random.default_rng(0)
    for i in range(4):
        array = rng.integers(0, 4096, (12, 12, 4)).astype(np.uint16)
        array[..., 3] = 65535  # opaque
        (tmp_path / f"{i}.{kind}").write_bytes(make(array))
    _, low, high = load(tmp_path).statistics["scale"]
    assert low == pytest.approx(4, abs=6) and high == pytest.approx(4091, abs=6)


@pytest.mark.parametrize("make, kind", [(png_16, "png"), (tiff_16, "tif"), (lambda a: tiff_16(a, compress=True), "tif"),
                                        (lambda a: tiff_16(a, order=">"), "tif"), (lambda a: tiff_16(a, True, ">"), "tif")])
def test_colours_of_16_bits_keep_all_bits(tmp_path, make, kind):
    """12-bit values in 16, as cameras and satellites give them: 16 grey levels in the high byte."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4096, (12, 16, 3)).astype(np.uint16) for _ in range(4)]
    for i, array in enumerate(arrays):
        (tmp_path / f"{i}.{kind}").write_bytes(make(array))
    data = load(tmp_path)
    _, low, high = data.statistics["scale"]
    assert low == pytest.approx(4, abs=6) and high == pytest.approx(4091, abs=6)
    for i, array in enumerate(arrays):
        expected = ((array[:, 2:14].astype(float) - low) / (high - low)).clip(0, 1) * 255
        assert np.abs(pixels(data, i) - expected).max() <= 0.51 and len(np.unique(pixels(data, i))) > 150


@pytest.mark.parametrize("make, kind", [(png_16, "png"), (tiff_16, "tif")])
def test_transparent_pixels_of_16_bits_are_white(tmp_path, make, kind):
    for i in range(4):
        array = np.full((16, 16, 4), 65535, np.uint16)
        array[..., :3] = ramp(0, 4095)[..., None]
        array[:8, :, 3] = 0
        (tmp_path / f"{i}.{kind}").write_bytes(make(array))
    image = pixels(load(tmp_path))
    assert (image[:8] == 255).all() and np.abs(image[8:, :, 0] - ramp(0, 255)[8:]).max() < 2


def test_outliers_do_not_take_the_grey_levels_of_the_others(tmp_path):
    """A hot pixel of 65535 among 0 ... 1000."""
    tmp_path.mkdir(exist_ok=True)
    for i in range(20):
        array = ramp(0, 1000, 40).astype(np.uint16)
        array[3, 3] = 65535 if i == 7 else 50
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    assert load(tmp_path).statistics["scale"][1:] == pytest.approx([0, 1000], abs=10)


def test_rare_bright_points_are_not_lost(tmp_path):
    """Beads under a microscope: one pixel in 4096, so both quantiles are the background."""
    for i in range(4):
        array = np.full((64, 64), 7, np.uint16)
        array[i, i] = 900
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    data = load(tmp_path, "--image-size", 64)
    assert data.statistics["scale"] == ["16 bits", 7, 8] and data.train[0].max() == 255 and data.train[0].float().mean() < 1


def save_holes(root, dtype, low, high, *holes, share=0.2):
    """Twenty images of low ... high, in which each of `holes` takes a share of the pixels. -> (arrays, where there are no holes)"""
    root.mkdir(exist_ok=True)
    rng, arrays, good = np.random.default_rng(0), [], []
    for i in range(20):
        array = ramp(low, high, 40).astype(dtype)
        which = rng.random(array.shape)
        for k, hole in enumerate(holes):
            array[(which >= k * share) & (which < (k + 1) * share)] = hole
        Image.fromarray(array).save(root / f"{i:02d}.tif")
        arrays.append(array.astype(np.float64))
        good.append(which >= len(holes) * share)
    return arrays, good


LEAST = -3.4028234663852886e38
HOLES = [(np.float32, 200, 310, [-9999]), (np.float32, 0, 1, [LEAST]), (np.float32, -3, 5, [3.4e38]), (np.float32, 0, 300, [-9999, -32768]),
         (np.float32, 10, 20, [LEAST, -3.4e38, 3.4e38]), (np.float32, 10, 20, [-9999, 1e20]), (np.uint16, 200, 4000, [65535]),
         (np.uint16, 5000, 9000, [0]), (np.int32, -1000, 1500, [-32768]), (np.float32, 7000, 8800, [-9999, 0])]


@pytest.mark.parametrize("share", [0.002, 0.2, 0.45])
@pytest.mark.parametrize("dtype, low, high, holes", HOLES)
def test_numbers_of_missing_pixels_take_no_grey_levels(tmp_path, capsys, dtype, low, high, holes, share):
    """-9999 among 200 ... 310 would leave three grey levels to what was measured."""
    arrays, good = save_holes(tmp_path / "images", dtype, low, high, *holes, share=min(share, 0.9 / len(holes)))
    data = load(tmp_path / "images", "--image-size", 40)
    line = first_line(capsys)
    assert data.statistics["scale"][1:] == pytest.approx([low, high], abs=0.01 * (high - low))
    found = re.search(r"(?:floats|bits) without (.*): ", line)[1].split(", ")
    for hole in holes:
        assert any(float(x) == pytest.approx(hole, rel=1e-3) for x in found), (hole, line)
    for i in (0, 7):
        expected = (arrays[i] - low) / (high - low) * 255
        assert np.abs(pixels(data, i)[..., 0] - expected)[good[i]].max() < 4
        for hole in holes:  # black below, white above
            assert (pixels(data, i)[..., 0][np.isclose(arrays[i], hole, rtol=1e-6)] == (0 if hole < low else 255)).all()


@pytest.mark.parametrize("dtype, low, high, holes", [
    (np.uint16, 0, 65535, []), (np.uint16, 0, 4000, [6000]), (np.float32, 0, 1, [0]), (np.int32, -1024, 3071, [-2000]), (np.uint16, 7, 7, [900])])
def test_numbers_that_are_not_far_from_the_others_belong_to_them(tmp_path, capsys, dtype, low, high, holes):
    save_holes(tmp_path / "images", dtype, low, high, *holes)
    scale = load(tmp_path / "images").statistics["scale"]
    ends = min([low, *holes]), max([high, *holes])
    assert scale[1:] == pytest.approx(ends, abs=0.01 * (ends[1] - ends[0])) and re.search(r"(floats|bits): ", first_line(capsys))


def test_a_run_on_images_with_missing_pixels_measures_them_as_it_was_trained(tmp_path, capsys):
    for name in ("a", "b"):
        save_holes(tmp_path / name, np.float32, 0, 1 + (name == "b"), -9999)
    result, run = small_run(tmp_path, tmp_path.parent / f"{tmp_path.name}-run")
    assert result.status == 0 and "floats without -9999: " in result.out, result.err
    assert small_run(tmp_path, run, "--resume", "--epochs", 2)[0].status == 0
    assert evaluate(run)[0].status == 0


def test_constant_deep_images_are_read(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / f"{i}.tif")
    assert load(tmp_path).train.unique().tolist() == [0]


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_refused_by_name(tmp_path, value, more):
    arrays = save_deep(tmp_path, 0, 1, np.float32)
    arrays[2][5, 5] = value
    Image.fromarray(arrays[2]).save(tmp_path / "2.tif")
    message = refusal(tmp_path, *more)
    assert f"{tmp_path}/2.tif has pixels that are not finite" in message and "Traceback" not in message


@pytest.mark.parametrize("dtypes", [(np.uint8, np.float32), (np.uint16, np.uint8), (np.int32, np.float32), (np.uint16, np.int32)])
@BOTH
def test_mixed_kinds_are_refused_by_name(tmp_path, dtypes, more):
    save_deep(tmp_path / "a", 0, 200, dtypes[0], count=5)
    save_deep(tmp_path / "b", 0, 200, dtypes[1], count=2)
    message = refusal(tmp_path, *more)
    assert message.startswith((f"{tmp_path}/a/", f"{tmp_path}/b/")) and "no one scale" in message and "convert it" in message


def test_the_scale_is_that_of_the_training_images(tmp_path):
    for name in ("a", "b"):
        save_deep(tmp_path / "train" / name, 0, 100, np.int32)
        save_deep(tmp_path / "test" / name, 0, 200, np.int32)
    data = load(tmp_path)
    assert data.statistics["scale"][1:] == pytest.approx([0, 100], abs=1)
    assert data.test[3].min() == 255 and data.test[0].max() < 130


# ---- 3. Pixels: 8 bits ---------------------------------------------------------------------------


def quarters(side=16):
    """Red, green / blue, yellow: tells orientation."""
    image = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    image[:half, :half], image[:half, half:], image[half:, :half], image[half:, half:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    return image


TURNS = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2),
         6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(tmp_path, orientation, kind):
    """Stored turned, with the note how to turn it back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    for i in range(2):
        Image.fromarray(np.ascontiguousarray(TURNS[orientation](quarters()))).save(tmp_path / f"{i}.{kind}", exif=exif, **settings)
    assert np.abs(pixels(load(tmp_path)).astype(int) - quarters()).max() < 30


def test_exif_orientation_of_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        Image.fromarray(np.ascontiguousarray(np.rot90(ramp(0, 4095).astype(np.uint16)))).save(tmp_path / f"{i}.png", exif=exif)
    assert np.abs(pixels(load(tmp_path))[..., 0] - ramp(0, 255)).max() < 2


def transparent(mode):
    """Hidden red where alpha is 0 (the upper half), black below."""
    image = np.zeros((16, 16, 4), np.uint8)
    image[:8, :, 0], image[8:, :, 3] = 200, 255
    image = Image.fromarray(image)
    return image if mode == "RGBA" else image.convert("RGBA").convert(mode)


@BOTH
@pytest.mark.parametrize("kind", ["rgba.png", "la.png", "rgba.webp", "rgba.tif", "palette.png", "colour.png", "grey.png"])
def test_transparent_pixels_show_white_and_not_their_hidden_colour(tmp_path, kind, more):
    for i in range(2):
        path = tmp_path / f"{i}.{kind}"
        if kind == "palette.png":  # entry 1 is hidden
            image = Image.fromarray((np.arange(16)[:, None] < 8).repeat(16, 1).astype(np.uint8), "P")
            image.putpalette([0, 0, 0, 200, 0, 0])
            image.save(path, transparency=1)
        elif kind == "colour.png":
            transparent("RGBA").convert("RGB").save(path, transparency=(200, 0, 0))
        elif kind == "grey.png":
            transparent("LA").convert("L").save(path, transparency=transparent("LA").getpixel((0, 0))[0])
        else:
            transparent("LA" if kind == "la.png" else "RGBA").save(path, **({"lossless": True, "exact": True} if "webp" in kind else {}))
    data = load(tmp_path, *more)
    image = pixels(data) if not more else common.read_image(data.train.paths[0]).permute(1, 2, 0).numpy()
    assert (image[:8] == 255).all() and (image[8:] == 0).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    image = np.full((16, 16, 4), (100, 0, 200, 128), np.uint8)
    for i in range(2):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    assert pixels(load(tmp_path))[3, 3].tolist() == pytest.approx([177, 127, 227], abs=1)


def test_cmyk_palette_and_1_bit_are_read(tmp_path):
    colour = Image.fromarray(np.full((16, 16, 3), (200, 40, 90), np.uint8))
    colour.convert("CMYK").save(tmp_path / "0.tif")
    colour.quantize(4).save(tmp_path / "1.png")
    Image.fromarray(np.arange(256).reshape(16, 16) < 128).save(tmp_path / "2.png")
    data = load(tmp_path)
    assert all(np.abs(pixels(data, i).astype(int) - (200, 40, 90)).max() <= 2 for i in (0, 1))
    assert (pixels(data, 2)[:8] == 255).all() and (pixels(data, 2)[8:] == 0).all()


def pages(count=3):
    return [Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)) for i in range(count)]


def test_of_several_pages_the_first_is_read_and_that_is_said(tmp_path, capsys):
    first, *others = pages()
    for i in range(2):
        first.save(tmp_path / f"{i}.tif", save_all=True, append_images=others)
    first.save(tmp_path / "2.webp", save_all=True, append_images=others, lossless=True)
    first.save(tmp_path / "3.png", save_all=True, append_images=others)
    first.save(tmp_path / "animated.gif", save_all=True, append_images=others)
    first.save(tmp_path / "gif.png", "GIF", save_all=True, append_images=others)
    first.save(tmp_path / "one.tif")
    data = load(tmp_path)
    assert len(data.train) == 6 and data.train.max() == 0
    line = first_line(capsys)
    assert "skipped: 5 file's further pages, 1 of a kind that is not read (.gif)" in line


def corrupt_files():
    """Bytes that decoders stumble over, by name."""
    import io
    good = Image.fromarray(quarters(64))
    content, rng = {}, np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "ICO"):
        buffer = io.BytesIO()
        try:
            good.save(buffer, kind)
        except (KeyError, OSError):
            continue
        data = bytearray(buffer.getvalue())
        content[f"cut-{kind}.jpg"] = bytes(data[: len(data) // 2])
        for i in range(12):
            damaged = data.copy()
            for place in rng.integers(8, min(len(damaged), 400), 12):
                damaged[place] = rng.integers(256)
            content[f"{kind}-{i}.png"] = bytes(damaged)
    content.update({"empty.png": b"", "html.jpg": b"<html>", "zeros.tif": bytes(500), "fits.png": b"SIMPLE  =                    T" + b" " * 80})
    return content


@BOTH
def test_whatever_a_decoder_raises_is_an_unreadable_file(tmp_path, capsys, more):
    fill(tmp_path, 4)
    for name, content in corrupt_files().items():
        (tmp_path / name).write_bytes(content)
    data = load(tmp_path, *more)
    assert len(data.train) >= 4 and " unreadable" in first_line(capsys)


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, KeyError, ZeroDivisionError, struct.error, AttributeError, RecursionError, EOFError])
def test_a_plugin_may_raise_any_error(tmp_path, monkeypatch, kind):
    fill(tmp_path, 4)

    def fail(self):
        raise kind("decoder")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    assert common.read_image(str(tmp_path / "0.png")) is None


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_no_memory_and_an_interrupt_are_not_unreadable_files(tmp_path, monkeypatch, kind):
    fill(tmp_path, 4)

    def fail(self):
        raise kind

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(kind):
        common.read_image(str(tmp_path / "0.png"))


@BOTH
def test_an_image_refused_for_its_size_is_too_large(tmp_path, capsys, monkeypatch, more):
    fill(tmp_path, 4)
    write_image(tmp_path / "huge.png", np.zeros((100, 100, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    load(tmp_path, *more)
    out, err = capsys.readouterr()
    assert out.splitlines()[0].endswith("skipped: 1 too large") and err == f"skipped 1 too large: {tmp_path}/huge.png\n"


# ---- 4. What the network needs is kept -----------------------------------------------------------


def small_run(root, out, *more):
    """A run of cw_rgp on the folder. -> (result, folder of the run)"""
    argv = ["--dataset", "folder", "--data-dir", root, "--out", out, "--batch-size", 16, "--w-size", 8, "--proj-dim", 32, "--proj-hidden", 32,
            "--groups", 1, "--w-iter", 1, "--epochs", 1, "--precision", "fp32", "--device", "cpu", *more]
    return run_here("cw_rgp", argv), out


def evaluate(run, root=None, *more):
    """(result of eval.py, its figures)"""
    report = run / "report.json"
    place = ["--dataset", "folder", "--data-dir", root] if root else []
    result = run_here("eval", [run, "--features", "H", "--probe-epochs", 0, "--json", report, "--device", "cpu", "--precision", "fp32", *place, *more])
    return result, json.loads(report.read_text())[0] if result.status == 0 else None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on class folders without a test set. -> (folder of images, of the run, its output)"""
    root = tmp_path_factory.mktemp("trained")
    for number, name in enumerate(("ant", "bee", "cow")):
        for i in range(20):
            write_image(root / "images" / name / f"{i}.png", draw_image(np.random.default_rng(i + 100 * number), number, 32))
    result, run = small_run(root / "images", root / "run", "--seed", 3)
    assert result.status == 0, result.err
    return root / "images", run, result.out


def test_test_images_that_are_training_images_are_counted(tmp_path):
    for number, name in enumerate(("ant", "bee")):
        for i in range(6):
            image = draw_image(np.random.default_rng(i + 100 * number), number, 32)
            write_image(tmp_path / "images" / "train" / name / f"{i}.png", image)
            if i < 2:
                write_image(tmp_path / "images" / "test" / name / f"again-{i}.png", image)
        write_image(tmp_path / "images" / "test" / name / "new.png", draw_image(np.random.default_rng(50 + number), number, 32))
    result, _ = small_run(tmp_path / "images", tmp_path / "run", "--batch-size", 8)
    assert result.status == 0 and result.err == "4 of 6 test images are training images, too; remove them\n", result.err
    assert "k = 12, cosine" in result.out  # as many as there are


def test_a_run_keeps_its_statistics_in_both_files(trained):
    root, run, out = trained
    assert out.splitlines()[0] == "48 training images in 3 classes, 12 test images (held out: --test-fraction 0.2), 32x32"
    checkpoint = torch.load(run / "last.pt", weights_only=True)["data_statistics"]
    assert checkpoint == json.loads((run / "config.json").read_text())["data_statistics"]
    data = load(root, "--seed", 3)
    expected = data.train.double() / 255
    assert checkpoint["mean"] == pytest.approx(expected.mean((0, 2, 3)).tolist())
    assert checkpoint["std"] == pytest.approx(expected.permute(1, 0, 2, 3).flatten(1).std(1, unbiased=False).tolist())
    assert checkpoint["size"] == 32 and checkpoint["class_names"] == ["ant", "bee", "cow"]
    assert checkpoint["scale"] is None and all(type(x) is float for x in checkpoint["mean"] + checkpoint["std"])


def test_a_run_of_16_bits_keeps_its_scale(tmp_path):
    save_deep(tmp_path / "images", 0, 4095, np.uint16, count=20)
    result, run = small_run(tmp_path / "images", tmp_path / "run")
    assert result.status == 0, result.err
    kept = torch.load(run / "last.pt", weights_only=True)["data_statistics"]
    assert kept["scale"][0] == "16 bits" and kept["scale"][1:] == pytest.approx([0, 4095], abs=40) and all(type(x) is float for x in kept["scale"][1:])
    for factor in (1, 0.5):
        save_deep(tmp_path / f"{factor}", 0, 4095 * factor, np.uint16, count=20)
    data = images_of(run, tmp_path / "0.5")
    assert data.statistics["scale"] == kept["scale"]
    assert data.train.max() == pytest.approx(127.5, abs=2)  # half as bright, not stretched again
    result, _ = evaluate(run)
    assert result.status == 0, result.err
    fill(tmp_path / "eight", 4, 16)
    result, _ = evaluate(run, tmp_path / "eight")
    assert is_one_line_error(result) and "has pixels of 8 bits" in result.err and "convert it to 16 bits" in result.err
    by_name = SimpleNamespace(args=SimpleNamespace(dataset="patterns"), statistics={"scale": None})
    with pytest.raises(common.UserError, match="--dataset patterns: the run saw images of 16 bits; try such ones"):
        evaluation.use_statistics(by_name, kept)


def images_of(run, root):
    """The Data on which eval.py measures a run."""
    args = evaluation.parse_args([str(run), "--dataset", "folder", "--data-dir", str(root)])
    return evaluation.load_data(evaluation.load_run(str(run), CPU), args, CPU)


def test_eval_holds_out_the_images_of_the_run(trained):
    root, run, _ = trained
    expected = load(root, "--seed", 3)
    for more in ([], ["--seed", "7"]):
        args = evaluation.parse_args([str(run), *more])
        data = evaluation.load_data(evaluation.load_run(str(run), CPU), args, CPU)
        assert torch.equal(data.test, expected.test) and torch.equal(data.train, expected.train) and data.args.seed == args.seed
    result, figures = evaluate(run)
    assert result.status == 0 and figures["training_images"] == 48 and figures["test_images"] == 12


def test_a_darkened_copy_gives_the_features_of_darkened_pixels(trained, tmp_path):
    """The network sees them with the run's mean and deviation; by the copy's own, they would be as bright as before."""
    root, run, _ = trained
    for path in root.rglob("*.png"):
        write_image(tmp_path / "dark" / path.relative_to(root), (np.array(Image.open(path)) * 0.25).astype(np.uint8))
    found = evaluation.load_run(str(run), CPU)
    data = images_of(run, tmp_path / "dark")
    h = common.extract(found.model.backbone, data, data.train)
    mean, std = (torch.tensor(found.statistics[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = found.model.backbone((data.train.float() / 255 - mean) / std)
    assert torch.allclose(h, expected, rtol=1e-4, atol=1e-5)
    bright = load(root, "--seed", 3)
    assert (h - common.extract(found.model.backbone, bright, bright.train)).norm() > 0.1 * h.norm()


def test_eval_on_another_data_set_feeds_it_with_the_runs_statistics(trained, monkeypatch):
    _, run, _ = trained
    small = common.make_patterns(0, 40, 20)
    monkeypatch.setattr(common, "make_patterns", lambda: small)
    found = evaluation.load_run(str(run), CPU)
    data = evaluation.load_data(found, evaluation.parse_args([str(run), "--dataset", "patterns"]), CPU)
    assert data.mean.flatten().tolist() == pytest.approx(found.statistics["mean"]) and len(data.train) == 40
    assert data.class_names == common.PATTERN_CLASSES


def test_classes_are_matched_by_name(trained, tmp_path):
    root, run, _ = trained
    for name in ("cow", "bee", "aardvark"):
        fill(tmp_path / "train" / name, 4, 32)
        fill(tmp_path / "test" / name, 2, 32)
    data = images_of(run, tmp_path)
    assert data.class_names == ["ant", "bee", "cow", "aardvark"]
    assert data.train_labels.tolist() == [3] * 4 + [1] * 4 + [2] * 4 and data.test_labels.tolist() == [3] * 2 + [1] * 2 + [2] * 2
    result, figures = evaluate(run, tmp_path)
    assert result.status == 0 and "3 classes" in result.out and figures["class_names"] == data.class_names


@pytest.mark.parametrize("edit", [{"std": [0.0, 1, 1]}, {"mean": [0.5]}, {"mean": "abc"}, {"mean": [float("nan")] * 3}, {"scale": ["16 bits", 1, 0]},
                                  {"scale": [0.0]}, {"class_names": 5}, {"std": None}, {"scale": [0, 1, 2]}, {"scale": ["16 bits", 0, float("inf")]}])
def test_edited_statistics_are_one_line(trained, tmp_path, edit):
    _, run, _ = trained
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["data_statistics"].update(edit)
    torch.save(checkpoint, tmp_path / "last.pt")
    result = run_here("eval", [tmp_path, "--device", "cpu"])
    assert is_one_line_error(result), result.err


def test_a_resume_with_another_test_fraction_is_refused(trained):
    root, run, _ = trained
    result, _ = small_run(root, run, "--seed", 3, "--resume", "--test-fraction", 0.3)
    assert is_one_line_error(result) and "--test-fraction was 0.2 and is now 0.3; try --test-fraction 0.2" in result.err
    result, _ = small_run(root, run, "--seed", 3, "--resume")
    assert result.status == 0, result.err


def test_a_run_of_few_train_images_is_resumed_with_them_and_measured_with_all(trained, tmp_path):
    root, _, _ = trained
    few = "--train-images", 16, "--seed", 3
    result, run = small_run(root, tmp_path / "run", *few)
    assert result.status == 0 and result.out.startswith("16 of 48 training images in 3 classes, 12 test images"), result.err
    assert "12 test images against 48 training images" in result.out
    result, _ = small_run(root, run, "--seed", 3, "--resume")
    assert is_one_line_error(result) and "--train-images was 16 and is now None; try --train-images 16" in result.err
    result, _ = small_run(root, run, *few, "--resume", "--epochs", 2)
    assert result.status == 0, result.err
    result, report = evaluate(run)
    assert result.status == 0 and result.out.startswith("48 training images in 3 classes"), result.err


def test_a_resume_after_a_file_broke_is_refused(trained, tmp_path):
    root, run, _ = trained
    shutil.copytree(root, tmp_path / "images")
    shutil.copytree(run, tmp_path / "run")
    path = next(path for path in load(root, "--seed", 3, *STREAM).train.paths if "ant" in path)
    (tmp_path / "images" / os.path.relpath(path, root)).write_bytes(b"broken")
    result, _ = small_run(tmp_path / "images", tmp_path / "run", "--seed", 3, "--resume")
    assert result.status == 2 and "--data-dir holds other images than before (47 files" in result.err and "then 48 files" in result.err


def test_all_ranks_decide_alike(trained, monkeypatch):
    root, _, _ = trained
    alone = load(root)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        data = load(root)
        assert torch.equal(data.train, alone.train) and torch.equal(data.test, alone.test) and data.statistics == alone.statistics


@pytest.mark.slow
def test_two_processes_of_torchrun_hold_out_the_same_images_and_keep_the_same_statistics(trained, tmp_path):
    import subprocess
    import sys

    from conftest import ROOT
    root, run, _ = trained
    argv = ["--dataset", "folder", "--data-dir", root, "--out", tmp_path / "run", "--batch-size", 16, "--w-size", 8, "--proj-dim", 32,
            "--proj-hidden", 32, "--groups", 1, "--w-iter", 1, "--epochs", 1, "--precision", "fp32", "--device", "cpu", "--seed", 3, "--stream"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "methods" / "cw_rgp.py",
                           *map(str, argv)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "48 training images in 3 classes, 12 test images (held out: --test-fraction 0.2), 32x32"
    kept = [torch.load(folder / "last.pt", weights_only=True) for folder in (run, tmp_path / "run")]
    assert kept[0]["data_statistics"] == kept[1]["data_statistics"] and kept[0]["data"] == kept[1]["data"]


# ---- 5. What can be read decides -----------------------------------------------------------------


def spoil(folder, *which):
    for i in which:
        (folder / f"{i}.png").write_bytes(b"broken")


@BOTH
def test_a_class_without_readable_images_is_no_class(tmp_path, capsys, more):
    fill_all(tmp_path, "a", "b", "c", count=5)
    spoil(tmp_path / "b", *range(5))
    data = load(tmp_path, *more)
    assert data.class_names == ["a", "c"] and data.train_labels.tolist() == [0] * 4 + [1] * 4 and data.test_labels.tolist() == [0, 1]
    assert first_line(capsys) == "8 training images in 2 classes, 2 test images (held out: --test-fraction 0.2), 16x16; skipped: 5 unreadable"
    spoil(tmp_path / "c", *range(5))
    assert "only one class, ['a']" in refusal(tmp_path, *more)


@BOTH
@pytest.mark.parametrize("good", range(4))
def test_the_only_readable_image_of_a_class_is_trained_on_and_of_two_one_is_held_out(tmp_path, good, more):
    fill_all(tmp_path, "a", "b", count=4)
    spoil(tmp_path / "a", *set(range(4)) - {good})
    spoil(tmp_path / "b", *set(range(4)) - {good, (good + 1) % 4})
    data = load(tmp_path, *more)
    assert data.train_labels.tolist() == [0, 1] and data.test_labels.tolist() == [1]


@BOTH
def test_a_class_of_which_only_test_images_can_be_read_keeps_its_label(tmp_path, more):
    fill_all(tmp_path, "train/a", "train/b", "train/c", "test/a", "test/b", "test/c", count=2)
    spoil(tmp_path / "train" / "b", 0, 1)
    data = load(tmp_path, *more)
    assert data.train_labels.tolist() == [0, 0, 2, 2] and data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    spoil(tmp_path / "test" / "b", 0, 1)
    data = load(tmp_path, *more)
    assert data.class_names == ["a", "c"] and data.test_labels.tolist() == [0, 0, 1, 1]


def test_a_file_more_or_less_moves_no_other(tmp_path):
    fill_all(tmp_path, "cat", "dog", count=20)
    first = held_out(tmp_path)
    trained_on = next(path for path in load(tmp_path, *STREAM).train.paths if "cat" in path)
    content = open(trained_on, "rb").read()
    for name in ("0a.png", "zz.png"):  # 21 of a class: still 4 held out
        (tmp_path / "cat" / name).write_bytes(content)
        assert len(first - set(load(tmp_path, *STREAM).test.paths)) <= 1
        (tmp_path / "cat" / name).unlink()
    os.remove(trained_on)
    assert set(load(tmp_path, *STREAM).test.paths) == first


def test_eval_warns_if_a_changed_folder_holds_out_others(trained, tmp_path):
    root, run, _ = trained
    result, _ = evaluate(run)
    assert result.status == 0 and "trained on" not in result.err
    shutil.copytree(root, tmp_path / "images")
    fill(tmp_path / "images" / "ant", 1, 32, first=50)
    result, _ = evaluate(run, tmp_path / "images")
    assert result.status == 0 and result.err.count("some test images may have been trained on\n") == 1


def resumed(root, run, change, tmp_path, *more):
    """What --resume says after change(folder of images)."""
    shutil.copytree(root, tmp_path / "images"), shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "images")
    return small_run(tmp_path / "images", tmp_path / "run", "--resume", *more)[0]


@pytest.fixture(scope="module")
def with_test(tmp_path_factory):
    """A run on train and test. -> (folder of images, of the run)"""
    root = tmp_path_factory.mktemp("with_test")
    fill_all(root / "images", "train/a", "train/b", count=10)
    fill_all(root / "images", "test/a", "test/b", "other/a", "other/b", count=3)
    shutil.move(root / "images" / "other", root / "other")
    result, run = small_run(root / "images", root / "run")
    assert result.status == 0, result.err
    return root / "images", run


CHANGES = {"nothing": lambda images: None, "a test file less": lambda images: (images / "test" / "a" / "0.png").unlink(),
           "val": lambda images: (images / "test").rename(images / "val"), "no test": lambda images: shutil.rmtree(images / "test"),
           "a label": lambda images: (images / "train/a/1.png").rename(images / "train/b/new.png"),
           "a test label": lambda images: (images / "test/a/1.png").rename(images / "test/b/new.png"),
           "darker": lambda images: [write_image(path, np.array(Image.open(path)) // 2) for path in images.rglob("*.png")]}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_with_other_images_or_labels_is_refused(with_test, tmp_path, name):
    result = resumed(*with_test, CHANGES[name], tmp_path, "--epochs", 2)
    if name == "nothing":
        assert result.status == 0, result.err
    else:
        assert is_one_line_error(result) and "--resume: --data-dir h" in result.err, result.err
    assert name != "darker" or "holds other images" in result.err


def test_a_resume_with_swapped_lines_of_labels_csv_is_refused(tmp_path):
    fill(tmp_path / "images", 20)
    lines = [f"{i}.png,{'ab'[i % 2]}\n" for i in range(20)]
    (tmp_path / "images" / "labels.csv").write_text("file,label\n" + "".join(lines))
    assert small_run(tmp_path / "images", tmp_path / "run")[0].status == 0
    lines[0], lines[1] = "0.png,b\n", "1.png,a\n"
    (tmp_path / "images" / "labels.csv").write_text("file,label\n" + "".join(lines))
    result, _ = small_run(tmp_path / "images", tmp_path / "run", "--resume")
    assert is_one_line_error(result) and "--resume: --data-dir holds other images than before (16 files" in result.err


# ---- 6. Pixels that Pillow misreads, pipes, long images ------------------------------------------


def tiff(array, photometric=1, form=None, planar=1, extra=None):
    """A TIFF of little-endian numbers, [H, W] or [H, W, channels], with whatever tags."""
    height, width, channels = (*array.shape, 1)[:3]
    planes = channels if planar == 2 else 1
    content = (array.transpose(2, 0, 1) if planar == 2 else array).tobytes()
    places = [8 + i * len(content) // planes for i in range(planes)]
    tags = [(256, [width]), (257, [height]), (258, [8 * array.itemsize] * channels), (259, [1]), (262, [photometric]), (273, places),
            (277, [channels]), (278, [height]), (279, [len(content) // planes] * planes), (284, [planar])]
    tags += ([(338, [extra])] if extra is not None else []) + ([(339, [form] * channels)] if form else [])
    end, more = 8 + len(content) + 2 + 12 * len(tags) + 4, b""
    out = b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags))
    for tag, values in tags:
        packed = struct.pack(f"<{len(values)}I", *values)
        out += struct.pack("<HHI", tag, 4, len(values)) + (packed if len(values) == 1 else struct.pack("<I", end + len(more)))
        more += packed if len(values) > 1 else b""
    return out + struct.pack("<I", 0) + more


def numbers(dtype, *channels):
    return np.random.default_rng(0).integers(0, 100, (16, 16, *channels)).astype(dtype)


def png_transparent(channels):
    """A PNG of 16 bits with one colour that is transparent."""
    content = png_16(numbers(np.uint16, channels))
    chunk = b"tRNS" + bytes(2 * channels)
    return content[:33] + struct.pack(">I", 2 * channels) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


MISREAD = {"cmyk.tif": tiff(numbers(np.uint16, 4), 5), "int8.tif": tiff(numbers(np.int8), form=2), "white is 0.tif": tiff(numbers(np.uint16), 0),
           "float white is 0.tif": tiff(numbers(np.float32), 0, form=3), "planes.tif": tiff(numbers(np.uint16, 3), 2, planar=2),
           "premultiplied.tif": tiff(numbers(np.uint16, 4), 2, extra=1), "grey.png": png_transparent(1), "colour.png": png_transparent(3), "grey and alpha.png": png_16(numbers(np.uint16, 2))}


@BOTH
@pytest.mark.parametrize("name", MISREAD)
def test_pixels_that_pillow_misreads_are_skipped(tmp_path, capsys, name, more):
    for i in range(3):
        (tmp_path / f"{i} {name}").write_bytes(MISREAD[name])
    assert "3 unreadable" in refusal(tmp_path, *more)
    for dtype in (np.uint8, np.uint16):
        save_deep(tmp_path / dtype.__name__, 0, 200, dtype)
        for path in tmp_path.glob(f"* {name}"):
            shutil.copy(path, tmp_path / dtype.__name__)
        capsys.readouterr()
        assert len(load(tmp_path / dtype.__name__, *more).train) == 4
        assert "skipped: 3 unreadable" in first_line(capsys)


@pytest.mark.parametrize("dtype, form", [(np.float16, 3), (np.float64, 3), (np.uint64, 1), (np.int64, 2)])
def test_half_and_double_numbers_are_skipped(tmp_path, dtype, form):
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(tiff(numbers(dtype), form=form))
    assert "skipped: 3 unreadable" in refusal(tmp_path)


@pytest.mark.parametrize("form", [None, 1])
def test_unsigned_numbers_of_32_bits_above_2_to_the_31_are_read(tmp_path, form):
    arrays = [ramp(2**30 * i, 2**30 * (i + 1) - 1).astype(np.uint32) for i in range(4)]
    for i, array in enumerate(arrays):
        (tmp_path / f"{i}.tif").write_bytes(tiff(array, form=form))
    data = load(tmp_path)
    assert data.statistics["scale"][1:] == pytest.approx([0, 2**32], abs=2**25)
    for i, array in enumerate(arrays):
        assert np.abs(pixels(data, i)[..., 0] - array / 2**32 * 255).max() < 2


def test_8_bit_planes_and_white_as_0_are_read(tmp_path):
    colours, grey = numbers(np.uint8, 3), numbers(np.uint8)
    (tmp_path / "0.tif").write_bytes(tiff(colours, 2, planar=2))
    (tmp_path / "1.tif").write_bytes(tiff(grey, 0))
    data = load(tmp_path)
    assert (pixels(data, 0) == colours).all() and (pixels(data, 1)[..., 0] == 255 - grey).all()


@pytest.mark.parametrize("value", [1e17, -1e17, 3e38])
@pytest.mark.filterwarnings("error")
def test_constant_images_of_large_numbers(tmp_path, value):
    (tmp_path / "images").mkdir()
    for i in range(20):
        array = np.full((64, 64), value, np.float32)
        array.flat[np.random.default_rng(i).choice(4096, 4, False)] += abs(value) / 10  # too few to count
        Image.fromarray(array).save(tmp_path / "images" / f"{i}.tif")
    data = load(tmp_path / "images")
    assert data.statistics["scale"][1] < data.statistics["scale"][2]
    result, run = small_run(tmp_path / "images", tmp_path / "run")
    assert result.status == 0, result.err
    assert evaluate(run)[0].status == 0


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (40, 17), (331, 16), (8, 9)])
@pytest.mark.parametrize("side", [4, 8, 32])
def test_squares_are_those_of_the_centre_as_pillow_resizes_them(side, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    least = min(shape)
    top, left = (round((length - least) / 2) for length in shape)
    square = Image.fromarray(image).crop((left, top, left + least, top + least))
    expected = np.array(square.resize((side, side), Image.Resampling.BILINEAR)).astype(int)
    found = common.to_square(torch.from_numpy(image).permute(2, 0, 1), side)
    assert found.shape == (3, side, side) and np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_no_warnings_of_pillow(tmp_path):
    import subprocess
    import sys

    from conftest import ROOT
    fill(tmp_path, 4)
    for name, content in corrupt_files().items():
        (tmp_path / name).write_bytes(content)
    code = ("import sys; sys.path[:0] = sys.argv[2:]\nimport common, cw_rgp, torch\n"
            "common.Image.MAX_IMAGE_PIXELS = 200\n"
            "args = cw_rgp.parse_args(['--batch-size', '2', '--w-size', '2', '--dataset', 'folder', '--data-dir', sys.argv[1]])\n"
            "common.load_data(args, torch.device('cpu'))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path, ROOT, ROOT / "methods"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "/PIL/" not in done.stderr


# ---- 7. Messages ---------------------------------------------------------------------------------


def test_a_folder_without_its_data_set_is_refused(tmp_path):
    fill_all(tmp_path, "cat", "dog")
    result = run_here("cw_rgp", ["--data-dir", tmp_path])
    assert is_one_line_error(result) and f"--data-dir {tmp_path} needs --dataset folder" in result.err
    with pytest.raises(common.UserError, match="needs --dataset folder"):
        cw_rgp.Args(data_dir=str(tmp_path))
    cw_rgp.Args(data_dir="data"), cw_rgp.Args(data_dir=str(tmp_path), dataset="cifar10")


def walk_without(monkeypatch, *locked):
    """os.walk as one sees it who may not read these folders."""
    scandir = os.scandir

    def refuse(path="."):
        if str(path) in map(str, locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("name", ["", "train", "test", "Val", "train/dog"])
def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch, name):
    fill_all(tmp_path, "train/cat", "train/dog", "test/cat", "Val/cat")
    walk_without(monkeypatch, tmp_path / name if name else tmp_path)
    assert f"{tmp_path / name} (Permission denied) cannot be read; try the folder" in refusal(tmp_path)


def test_lines_name_at_most_five(tmp_path, capsys):
    fill_all(tmp_path, "cat", "dog")
    for i in range(40):
        (tmp_path / "cat" / f"x.kind{i}").write_bytes(b"")
    load(tmp_path)
    line = first_line(capsys)
    assert line.count("of a kind") == 5 and line.endswith(" and 35 more") and len(line) < 330
    fill_all(tmp_path, *(f"train{i}" for i in range(20)), "test", count=1)
    message = refusal(tmp_path)
    assert " and 16 more may be" in message and len(message) < 300 + len(str(tmp_path)) * 2
    shutil.rmtree(tmp_path)
    fill_all(tmp_path / "train", "a", "b")
    fill_all(tmp_path / "test", *(f"class{i}" for i in range(30)), count=1)
    assert "class11, class12 and 25 more has no" in refusal(tmp_path)


def test_labels_csv_with_absolute_paths_blank_lines_and_repeated_lines(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / "labels.csv").write_text(f"\n  \nfile,label\n{tmp_path}/0.png,cat\n , \n1.png,dog\n1.png,dog\n2.png,cat\n\t\n3.png,dog\n,\n")
    data = load(tmp_path, "--test-fraction", 0)
    assert data.class_names == ["cat", "dog"] and data.train_labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("text, part", [("0.png,cat\n1.png,cat\n", "labels.csv needs another"), ("a.gif,cat\nb.gif,dog\n", "4 not in labels.csv"),
                                        ("0.png,cat\n\n../outside.png,dog\n", "line 4"),
                                        ("0.png,cat\n{root}/../outside.png,dog\n", "line 3"), ("x" * 9999 + ",cat\n", "line 2")])
def test_a_labels_csv_that_names_no_images_of_two_classes(tmp_path, text, part):
    fill(tmp_path / "images")
    for name in ("images/a.gif", "images/b.gif", "outside.png"):
        (tmp_path / name).write_bytes(b"GIF89a")
    (tmp_path / "images" / "labels.csv").write_text("file,label\n" + text.replace("{root}", str(tmp_path / "images")))
    message = refusal(tmp_path / "images")
    assert part in message and len(message) < 300 + 2 * len(str(tmp_path))


@pytest.mark.parametrize("name", ["dev", "eval", "holdout", "hold_out", "unlabeled", "extra", "predict", "Evaluation"])
def test_train_beside_what_is_no_class_is_refused(tmp_path, name):
    fill_all(tmp_path, "train", name)
    names = ", ".join(sorted(["train", name]))
    assert f"{names} may be training and test images or classes" in refusal(tmp_path)
    fill_all(tmp_path / "other", "bus", name)
    assert load(tmp_path / "other").class_names == sorted(["bus", name])
