import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps

from customized_grpo.data import JsonlDataset
from customized_grpo.data.importers import import_folder
from customized_grpo.data.segment import add_masks, contact_sheet, make_detector, make_segmenter, mask_folder
from customized_grpo.errors import UserError


def dark_is_subject(picture):
    return ImageOps.invert(picture.convert("L")).point(lambda value: 255 if value > 128 else 0)


@pytest.fixture
def manifest(tmp_path):
    """Four subjects: dark on the left half; with a mask of its own; with an alpha channel; with nothing dark."""
    photo = Image.new("RGB", (8, 4), "white")
    photo.paste("black", (0, 0, 4, 4))
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    photo.save(tmp_path / "a" / "0.png")
    photo.save(tmp_path / "b" / "0.png")
    Image.new("L", (8, 4), 200).save(tmp_path / "b" / "0_mask.png")
    cut = photo.convert("RGBA")
    cut.putalpha(dark_is_subject(photo))
    cut.save(tmp_path / "c" / "0.png")
    Image.new("RGB", (8, 4), "white").save(tmp_path / "d" / "0.png")
    return import_folder(tmp_path, tmp_path / "data.jsonl", ["a {subject}", "a red {subject}"]).manifest


def test_every_reference_gets_a_mask(manifest):
    done = []
    output = manifest.parent / "other" / "masked.jsonl"
    lines = manifest.read_text().splitlines()
    lines[0] = lines[0][:-1] + ', "target": "d/0.png"}'
    manifest.write_text("\n".join(lines))
    made = add_masks(manifest, output, dark_is_subject, progress=lambda *count: done.append(count))
    assert (made.examples, made.skipped) == (8, 1)
    assert done[-1] == (3, 3)
    a, _, b, _, c, _, d, _ = JsonlDataset(output)
    assert a.target.size == (8, 4)
    assert [a.masks[0].getpixel((x, 0)) for x in (0, 7)] == [255, 0]
    assert b.masks[0].getextrema() == (255, 255)
    assert [c.masks[0].getpixel((x, 0)) for x in (0, 7)] == [255, 0]
    assert d.masks == ()
    assert len(list((manifest.parent / "other" / "masked").iterdir())) == 1
    with pytest.raises(UserError, match="exists already"):
        add_masks(manifest, output, dark_is_subject)


def test_bad_segmenters(manifest, monkeypatch):
    with pytest.raises(UserError, match=r"made a mask of \(2, 2\)"):
        add_masks(manifest, manifest.with_name("x.jsonl"), lambda picture: Image.new("L", (2, 2)))
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[masks\]'"):
        add_masks(manifest, manifest.with_name("y.jsonl"))


def test_masks_of_a_folder_are_beside_its_images_where_the_importer_finds_them(manifest):
    root, done = manifest.parent, []
    examples, empty = mask_folder(root, dark_is_subject, progress=lambda *count: done.append(count))
    assert ([example.id for example in examples], empty, done[-1]) == (["a/0.png"], ["c/0.png", "d/0.png"], (3, 3))
    again = import_folder(root, root / "again.jsonl", ["a {subject}"])
    a, b, *_ = JsonlDataset(again.manifest)
    assert [a.masks[0].getpixel((x, 0)) for x in (0, 7)] == [255, 0]
    assert b.masks[0].getextrema() == (255, 255), "a mask of one's own is kept"
    before = (root / "a" / "0_mask.png").read_bytes()
    assert mask_folder(root, lambda picture: Image.new("L", picture.size, 255))[0][0].id == "d/0.png"
    assert (root / "a" / "0_mask.png").read_bytes() == before
    with pytest.raises(UserError, match="has no subject folder with images"):
        mask_folder(root / "a", dark_is_subject)


def test_a_contact_sheet_shows_what_masks_leave(manifest):
    add_masks(manifest, manifest.with_name("masked.jsonl"), dark_is_subject)
    examples = JsonlDataset(manifest.with_name("masked.jsonl"))
    masked, bare = contact_sheet(examples[:1]), contact_sheet(examples[6:])
    assert masked.width == 3 * bare.width - 2 * 4
    row = [masked.getpixel((4 + column * 132 + 32, 22 + 64)) for column in range(3)]
    assert row == [(0, 0, 0), (255, 255, 255), (0, 0, 0)], "dark on the left, where the mask is white"


def tiny_segformer(folder, labels=("background", "subject")):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[4], patch_sizes=[3], strides=[2],
        num_attention_heads=[1], mlp_ratios=[1], decoder_hidden_size=4, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    model.decode_head.classifier.weight.data.zero_()
    model.decode_head.classifier.bias.data = torch.tensor([0.0, 1.0])
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def test_a_segmentation_model_on_disk(tmp_path):
    for labels, wanted in ((("background", "subject"), 255), (("subject", "LABEL_0"), 0)):
        segment = make_segmenter(str(tiny_segformer(tmp_path / labels[0], labels)))
        mask = segment(Image.new("RGB", (12, 6), "red"))
        assert (mask.mode, mask.size, mask.getextrema()) == ("L", (12, 6), (wanted, wanted))


def test_a_detection_model_on_disk(tmp_path):
    """Boxes are half as wide and high as the picture, in its middle; those that are no pixel wide are left out."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    model = YolosForObjectDetection(YolosConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, image_size=[32, 32],
        num_detection_tokens=2, id2label={0: "thing"},
    ))  # fmt: skip
    for head, bias in ((model.class_labels_classifier, [9.0, 0.0]), (model.bbox_predictor, [0.0, 0.0, 0.0, 0.0])):
        head.layers[-1].weight.data.zero_()
        head.layers[-1].bias.data = torch.tensor(bias)
    model.save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    detect = make_detector(str(tmp_path))
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (10, 5, 30, 15))
    assert [(crop.size, crop.getcolors()) for crop in detect(picture)] == [((20, 10), [(200, (255, 0, 0))])] * 2
    assert detect(Image.new("RGB", (1, 1))) == []


def test_models_that_are_not_run(tmp_path, monkeypatch):
    own = {"model_type": "birefnet", "auto_map": {"AutoConfig": "config.C", "AutoModelForImageSegmentation": "model.M"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "config.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"brings code of its own, which is not run; .*--model rembg:birefnet-general"):
        make_segmenter(str(tmp_path))
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        make_segmenter("nowhere")
    asked = []
    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=asked.append, remove=None))
    make_segmenter("rembg")
    make_segmenter("rembg:birefnet-general")
    assert asked == ["u2net", "birefnet-general"]
