"""Files that are almost right, and files that change after they were read: each was once taken without a word, and wrongly."""

import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from clip_vit import CLIPVisionTower
from data import first_named
from formats.annotations import image_ids, parse_sources, read_file, read_records
from formats.clips import shape_problem
from formats.features import open_features, write_features
from formats.files import read_config, write_json
from formats.originals import meta_tensors
from formats.run_folder import RunFolder
from formats.weights import open_tensors
from tasks.pope import mean_f1
from tools.blur import blur_image, detect_upright
from tools.prefcoco import clean_caption, localize
from train import PRESETS, TrainConfig

BOX = {"id": 1, "image_id": 7, "category_id": 18, "bbox": [20, 10, 40, 30]}


def refused(words, function, *args, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        function(*args, **options)


def instances(path, width, height, **changes):
    image = {"id": 7, "file_name": "1.png", "width": width, "height": height}
    names = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    write_json(path, {"images": [image], "annotations": [BOX], "categories": names} | changes)
    return path


def test_sizes_of_one_image_agree_in_all_files(coco):
    """Only the first file's size is compared with the pixels, and boxes of the second are in its own."""
    sources = [(instances(coco / f"{side}.json", side, side * 4 // 5), coco, 1.0) for side in (100, 50)]
    refused(r"1.png is \(100, 80\) in one file of --data and \(50, 40\)", read_records, sources)
    assert len(read_records(sources[:1] * 2)[0]) == 1


def test_every_way_to_name_an_image_counts_as_trained_on(tmp_path):
    write_json(tmp_path / "rows.json", [
        {"images": ["x/COCO_val2014_000000000042.jpg"]}, {"image": "val2014\\COCO_val2014_000000000043.jpg"},
        {"image_id": 44}, {"images": [{"file_name": "000000000045.jpg"}]},
    ])  # fmt: skip
    assert image_ids(tmp_path / "rows.json") == {42, 43, 44, 45}


def test_sources_in_json_have_one_to_three_parts():
    assert parse_sources('["a.json", ["b.json", "y", 0.5]]', "x") == [("a.json", "x", 1.0), ("b.json", "y", 0.5)]
    for text in ('[["a.json", "x", "0.5"]]', '[["a", "b", 1, 2]]', "[[]]"):
        refused("FILE@IMAGES", parse_sources, text, "x")


def test_names_may_end_in_any_letter_or_sign():
    for name in ("bow_(weapon)", "कुत्ता", "be\u0301be\u0301", "C++", "t.v."):
        assert first_named(f"There is a {name}.", ["dog", name]) == name
        assert clean_caption(f"The {name} is red.", name)[1] == ("brackets or coordinates" if "(" in name else None)
    assert first_named("There is a catalogue", ["cat"]) is None


def test_scaled_rotations_of_metas_files_are_refused(tmp_path):
    """As in LLaMA-3.1 and 3.2: the file does not say by which factor."""
    write_json(tmp_path / "params.json", {"dim": 8, "n_layers": 1, "n_heads": 1, "use_scaled_rope": True})
    refused("use_scaled_rope.*HF folder", meta_tensors, tmp_path)


def test_a_resnet_of_clip_is_named(tmp_path):
    save_file({"visual.conv1.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "open_clip_model.safetensors")
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": {"vision_cfg": {"width": 64}}})
    refused("no ViT of OpenAI's CLIP", CLIPVisionTower.from_pretrained, tmp_path)


def test_a_tensor_lies_in_one_shard(tmp_path):
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / names[0])
    save_file({"lm_head.weight": torch.zeros(2, 2), "norm.weight": torch.ones(2)}, tmp_path / names[1])
    index = {"lm_head.weight": names[0], "norm.weight": names[1]}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": index})
    refused("lm_head.weight.*another file", open_tensors, tmp_path)
    for name in ("model.safetensors.index.json", "config.json"):
        (tmp_path / name).write_text("[]")
        refused("is a JSON list", open_tensors if "index" in name else read_config, tmp_path)


def test_a_run_with_its_own_tower_takes_no_other(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "run")
    refused("own vision tower.*--vision", type(model).from_pretrained, tmp_path / "run", "other")


def test_background_is_no_object(coco):
    """labelme lists _background_ first. A category with boxes stays, whatever its name is."""
    categories = [{"id": 0, "name": "_background_"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    (record,), skipped = read_file(instances(coco / "i.json", 100, 80, categories=categories), coco)
    assert record.absent == ("cat",) and any("no objects" in reason for reason in skipped)
    categories = [{"id": 18, "name": "background"}, *categories[1:2]]
    (record,), skipped = read_file(instances(coco / "i.json", 100, 80, categories=categories), coco)
    assert record.present == ("background",) and not skipped


def test_descriptions_belong_to_the_boxes_of_the_same_file(coco, tmp_path):
    """PRefCOCO of one COCO file beside another: of other sizes, or without the category."""
    row = {"image": "1.png", "size": [100, 80], "name": "dog", "description": "dog that is red", "box_px": [20, 10, 60, 40]}
    write_json(tmp_path / "p.json", [row])
    args = tmp_path / "p.json", instances(tmp_path / "i.json", 200, 160), tmp_path / "out.json"
    refused("differ about 1.png", localize, *args)
    write_json(tmp_path / "p.json", [row | {"name": "cat"}])
    instances(tmp_path / "i.json", 100, 80)
    refused("differ about 1.png", localize, *args)


@pytest.mark.parametrize("turn", range(1, 9))
def test_faces_are_looked_for_in_an_upright_image(turn, tmp_path):
    """A detector that finds the white patch, and only if the black corner is at the upper left."""

    def detect(image):
        assert image.size == (40, 30) and image.getpixel((0, 0)) == (0, 0, 0), "not upright"
        x1, y1, x2, y2 = image.convert("L").point(lambda v: 255 * (v > 200)).getbbox()
        return [[x1, y1, x2 - x1, y2 - y1]]

    upright, back = Image.new("RGB", (40, 30), "grey"), dict(zip(range(2, 9), (0, 3, 1, 5, 2, 6, 4), strict=True))
    upright.paste("black", (0, 0, 5, 5))
    upright.paste("white", (20, 12, 27, 15))
    stored = upright.transpose(Image.Transpose(back[turn])) if turn > 1 else upright
    exif = stored.getexif()
    exif[0x0112] = turn
    ((x, y, width, height),) = detect_upright(stored, detect)
    assert stored.crop((x, y, x + width, y + height)).getcolors() == [(21, (255, 255, 255))]
    (tmp_path / "out").mkdir()
    for name in ("a.png", "a.tif"):
        stored.save(tmp_path / name, exif=exif)
        assert blur_image(tmp_path, tmp_path / "out", detect, name, None) == (1, None)
        with Image.open(tmp_path / "out" / name) as blurred:
            assert ImageOps.exif_transpose(blurred).getpixel((0, 0)) == (0, 0, 0)


def test_no_frame_of_an_animation_is_copied_unseen(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    (tmp_path / "out").mkdir()
    for name in ("a.gif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert blur_image(tmp_path, tmp_path / "out", lambda image: [], name, None) == (0, None)
        written = Image.open(tmp_path / "out" / name)
        assert getattr(written, "n_frames", 1) == 1 and written.convert("RGB").getpixel((5, 5))[0] > 200


def test_a_turned_clip_is_named():
    frame = Image.new("RGB", (64, 48))
    assert shape_problem("a.mp4", frame, (48, 64)) == "a.mp4 has frames of 64 x 48, but the annotations say 48 x 64"
    assert not any(shape_problem("a.mp4", frame, size) for size in ((640, 480), (128, 97), (0, 0)))


def lock_run(config, answers):
    try:
        RunFolder(config, 0, 1)
        answers.put("")
    except ValueError as error:
        answers.put(str(error))


def test_a_run_is_one_process_one_recipe_and_one_data_set(coco, tmp_path, monkeypatch):
    """A second process is refused while the first lives; neither recipe nor files of --data may change before --resume."""
    options = {"out": str(tmp_path / "run"), "data": f"{instances(coco / 'i.json', 100, 80)}", "images": str(coco)}
    run, resumed = RunFolder(TrainConfig(**options), 0, 1), TrainConfig(**options, resume=True)
    answers = multiprocessing.Queue()
    for words in ("another process trains", ""):
        other = multiprocessing.Process(target=lock_run, args=(resumed, answers))
        other.start()
        assert words in answers.get(timeout=60) and (words or not other.join())
        run.lock.close()
    (run.state / "2-6").mkdir(parents=True)
    (run.state / "2-6.bak").mkdir()
    assert RunFolder(resumed, 0, 1).complete() == [(2, 6)]
    longer = {2: replace(PRESETS["tiny"][2], warmup_ratio=0.5)}
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | longer)
    refused("recipes was", RunFolder, resumed, 0, 1)
    monkeypatch.undo()
    instances(coco / "i.json", 100, 80, annotations=[])
    refused("data_sha256", RunFolder, resumed, 0, 1)
    refused("--seed -1 must be at least 0", TrainConfig, seed=-1)


def test_features_are_of_the_pictures_as_they_are(make_model, coco, tmp_path):
    model, folder = make_model().eval(), tmp_path / "features"
    records, _ = read_file(instances(coco / "i.json", 100, 80), coco)
    write_features(records, folder, model.vision_tower, "squash")
    config, processes = TrainConfig(features=str(folder)), SimpleNamespace(rank=0, world=1)
    assert len(open_features(config, records, model, processes)[0]) == 1
    write_features(records, folder, model.vision_tower, "squash")  # is complete
    refused("geometry was 'squash'", write_features, records, folder, model.vision_tower, "pad")
    Image.effect_noise((100, 80), 90).convert("RGB").save(coco / "1.png")
    refused("1.png changed after", open_features, config, records, model, processes)


def test_a_mean_of_f1_says_what_differs():
    results = [{"metrics": {"F1": 0.5}, "short": is_short} for is_short in (True, False)]
    assert "of different short" in mean_f1(results, "eval") and "different" not in mean_f1(results[:1] * 2, "eval")
