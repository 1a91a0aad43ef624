"""Files that are almost right, and files that change after they were read: each was once taken without a word, and wrongly."""

import errno
import fcntl
import multiprocessing
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from clip_vit import CLIPVisionTower
from coords import CoordFormat
from data import (
    IMAGE_ID,
    REV_ANSWER,
    Object,
    Record,
    Wording,
    ask_rev,
    encode_prefix,
    first_named,
    judge_rev,
    marked,
    pack,
)
from evaluate import TASKS, Item
from formats.annotations import image_ids, note_fractions, parse_sources, read_file, read_records
from formats.clips import ratio_problem
from formats.eval_folder import trained_on
from formats.features import open_features, write_features
from formats.files import read_config, read_json, write_json
from formats.images import image_problem
from formats.journal import changes, open_journal
from formats.llava_hf import json_files
from formats.originals import meta_tensors
from formats.pictures import pictures_of
from formats.run_folder import RunFolder, lock
from formats.schema import llava_row
from formats.weights import open_tensors
from llama import LlamaConfig, read_tokenizer
from model import LocVLM, LocVLMConfig
from tasks.pope import mean_f1
from tools import prefcoco
from tools.blur import blur, blur_image, detect_upright
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
    refused(r"1.png has two sizes in these annotations, \(100, 80\) and \(50, 40\)", read_records, sources)
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
    assert ratio_problem("a.mp4", frame, (48, 64)) == "a.mp4 has frames of 64 x 48, not the aspect ratio of the annotations, 48 x 64"
    assert not any(ratio_problem("a.mp4", frame, size) for size in ((640, 480), (128, 97), (0, 0)))


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
        answer = answers.get(timeout=60)
        assert words in answer if words else answer == ""
        other.join()
        run.lock.close()
    (run.state / "2-6").mkdir(parents=True)
    (run.state / "2-6.bak").mkdir()
    assert RunFolder(resumed, 0, 1).complete() == [(2, 6)]
    longer = {2: replace(PRESETS["tiny"][2], warmup_ratio=0.5)}
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | longer)
    refused(r"recipes\.2\.warmup_ratio was 0.1, is 0.5;", RunFolder, resumed, 0, 1)
    assert changes({"a": {"b": 1}, "c": 2}, {"a": {}}) == ["a.b was 1, is None"]
    monkeypatch.undo()
    instances(coco / "i.json", 100, 80, annotations=[])
    refused("data_sha256", RunFolder, resumed, 0, 1)
    refused("--seed -1 must be a number from 0", TrainConfig, seed=-1)


def test_features_are_of_the_pictures_as_they_are(make_model, coco, tmp_path):
    model, folder = make_model().eval(), tmp_path / "features"
    records, _ = read_file(instances(coco / "i.json", 100, 80), coco)
    write_features(records, folder, model.vision_tower, "squash")
    config, processes = TrainConfig(features=str(folder)), SimpleNamespace(rank=0, world=1)
    assert len(open_features(config, records, model, processes)[0]) == 1
    write_features(records, folder, model.vision_tower, "squash")  # is complete
    for lost in (["features.json"], ["features.json", "features.npy"]):  # a kill after the array was made, or before
        for name in lost:
            (folder / name).unlink()
        (folder / "features.parts").mkdir()
        if not (folder / "features.npy").exists():  # rows that a lost file held are made again
            (folder / "features.parts/part-0.jsonl").write_text('["0", []]\n')
        write_features(records, folder, model.vision_tower, "squash")
        assert len(open_features(config, records, model, processes)[0]) == 1
    assert open_features(config, records, model, processes)[1].read(records[0].image).any()
    refused("geometry was 'squash'", write_features, records, folder, model.vision_tower, "pad")
    Image.effect_noise((100, 80), 90).convert("RGB").save(coco / "1.png")
    refused("1.png changed after", open_features, config, records, model, processes)


def test_a_mean_of_f1_says_what_differs():
    results = [{"metrics": {"F1": 0.5}, "short": is_short} for is_short in (True, False)]
    assert "differ in short" in mean_f1(results, "eval") and "differ" not in mean_f1(results[:1] * 2, "eval")
    counted = [{"metrics": {"F1": 0.5, f"questions ({release})": 3}, "questions_sha256": release} for release in "ab"]
    assert "differ in releases" in mean_f1(counted, "eval") and "same questions" in mean_f1(counted[:1] * 2, "eval")


def test_what_revloc_is_taught_is_what_it_is_judged_by():
    """Captions call a person a man, and a dog dogs."""
    rng = random.Random(0)
    for caption, category in (
        ("The man in the image is wearing a tie.", "person"), ("A man's tie is blue.", "tie"), ("The baby elephant is grey.", "elephant"), ("The dogs are brown.", "dog"), ("A bus is red.", "bus"),
    ):  # fmt: skip
        o = Object(category, (20, 10, 60, 40), clean_caption(caption, category)[0])
        record = Record("7", None, (100, 80), (o,), (category,), ("tie", "person", "dog"))
        item = Item("7", None, (100, 80), *ask_rev(o, record, Wording(CoordFormat("ivb", 224), words="description"), rng)[:1], {})
        item.answer = REV_ANSWER.format(category=o.description)
        item.truth = {"name": category, "names": ["tie", "person", "dog", "bus", "elephant"]}
        judge_rev(item, None)
        assert item.correct, item.answer
    assert first_named("There is a baby", ["person", "baby"]) == "baby", "a category of its own"
    assert first_named("Two capes", ["cap", "cape"]) == "cape" and first_named("A baby", ["cat", "person"]) == "person"
    assert first_named("There is a dogma", ["dog"]) is None


def test_ids_of_a_file_of_its_own_are_no_cocos(tmp_path):
    """COCO ids are in names of files; a data set's own ids are other images."""
    images = [{"id": n, "file_name": f"frame_{n}.jpg"} for n in (9, 139)]
    write_json(tmp_path / "own.json", {"images": images, "annotations": [{"image_id": 9}]})
    refused("names no COCO image", image_ids, tmp_path / "own.json")
    images[0]["file_name"] = "COCO_train2014_000000581857.jpg"
    write_json(tmp_path / "mdetr.json", {"images": images, "annotations": [{"image_id": 9}]})
    assert image_ids(tmp_path / "mdetr.json") == {581857}


def test_a_caption_that_had_to_stop_is_no_description(monkeypatch):
    """Only its last sentence is cut, and the first one counts."""
    answers = {"7-dog": "The dog lies next to a woman who is holding a", "7-cat": "The cat is grey. It is next to"}
    tokenizer = SimpleNamespace(encode=str.split)
    answerer = SimpleNamespace(tokenizer=tokenizer, functions=lambda is_blind: (None, lambda opened: dict(answers)))
    monkeypatch.setattr(prefcoco, "Answerer", lambda how, world: answerer)
    objects = [SimpleNamespace(name="dog"), SimpleNamespace(name="cat")]
    captions = {}
    for limit in (8, 99):
        _, describe = prefcoco.captioner("m", None, {"max_new_tokens": limit}, 1)
        captions[limit] = describe(([SimpleNamespace(id="7", objects=objects)], None))[0]
    assert captions[99] == list(answers.values())
    assert clean_caption(captions[8][0], "dog") == (None, "cut short")
    assert clean_caption(captions[8][1], "cat") == ("cat that is grey", None)


def test_rows_about_one_image_are_evaluated_together(coco):
    """Localize-Instruct has a row for each objective: an object is asked about once, and any category may be named."""
    row = {"image": "1.png", "size": [100, 80], "names": ["dog"], "box_px": [[20, 10, 60, 40]], "descriptions": ["dog that sleeps"]}
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    rows = [row | {"id": f"1-{name}", "objective": name, "conversations": turns} for name in ("loc", "rev")]
    write_json(coco / "localize.json", rows)
    args = SimpleNamespace(annotated=None, coco=coco / "localize.json", images=coco, limit=None, seed=0)
    for task in ("locpred", "revloc"):
        items, _ = TASKS[task].read(args, Wording(CoordFormat("ivb", 224)))
        assert len(items) == 1, task


def test_frames_of_another_shape_are_not_asked_about(tmp_path):
    (tmp_path / "clip").mkdir()
    for n in range(2):
        Image.new("RGB", (100, 80)).save(tmp_path / f"clip/{n}.png")
    item = Item("1", tmp_path / "clip", (80, 100), "?", {}, is_clip=True)
    for frames in (0, 2):
        refused("frames of 100 x 80, not the aspect ratio of the annotations, 80 x 100", pictures_of, item, frames)
        assert pictures_of(replace(item, size=None), frames)[0].size == (100, 80)


def test_what_a_foreign_start_was_trained_on_is_unknown(coco, tmp_path):
    notes = {"stages": "2", "data": str(instances(coco / "i.json", 100, 80)), "images": str(coco), "exclude": ""}
    for name in ("llava", "ours", "alone"):
        (tmp_path / name).mkdir()
        start = str(tmp_path / "llava") if name == "ours" else ""
        write_json(tmp_path / name / "config.json", {} if name == "llava" else {"locvlm": {"trained_with": notes | {"init_from": start}}})
    assert trained_on(str(tmp_path / "ours")) is None and trained_on(str(tmp_path / "alone"))


def test_a_tokenizer_without_special_tokens(tmp_path):
    """Of sentencepiece, -1 means none: no row may begin with it, and without an end no answer ends."""
    how = {"vocab_size": 30, "minloglevel": 2, "hard_vocab_limit": False, "model_prefix": str(tmp_path / "tokenizer")}
    for eos, words in ((2, None), (-1, "has no end token")):
        SentencePieceTrainer.train(sentence_iterator=iter(["It is located at (1, 2)"] * 9), bos_id=-1, eos_id=eos, **how)
        if words:
            refused(words, read_tokenizer, tmp_path)
            continue
        tokenizer = read_tokenizer(tmp_path)
        assert tokenizer.bos_token_id is None and min(encode_prefix(tokenizer, "plain", 1)) == IMAGE_ID
        assert marked(tokenizer, pack([IMAGE_ID], [([5], [5])], 9)).startswith("<image x 1>")
        made = json_files(LocVLMConfig(), tokenizer, len(tokenizer), 64)["tokenizer.json"]["post_processor"]
        assert [*made["single"][0]] == ["Sequence"] and made["special_tokens"] == {}


def test_a_resumed_run_has_the_same_images(coco, tmp_path):
    """One less, and every later step would draw others."""
    options = {"out": str(tmp_path / "run"), "data": f"{instances(coco / 'i.json', 100, 80)}", "images": str(coco)}
    records = [SimpleNamespace(id=str(n)) for n in range(3)]
    RunFolder(TrainConfig(**options), 0, 1, records).lock.close()
    refused(r"trained on 3 images \(ids \w+\), now there are 2 images", RunFolder, TrainConfig(**options, resume=True), 0, 1, records[1:])
    RunFolder(TrainConfig(**options, resume=True), 0, 1, records).lock.close()


def test_faces_of_another_size_of_image_are_not_blurred_elsewhere(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (120, 90)).save(tmp_path / "photos/1.png")
    whole_body = {"images": [{"id": 1, "file_name": "1.png", "width": 640, "height": 480}],
                  "annotations": [{"id": 1, "image_id": 1, "face_box": [10, 10, 20, 20]}]}  # fmt: skip
    for faces, words in (
        (whole_body, "has 120 x 90 pixels, but --faces says 640 x 480; correct that file"),
        ({"1.png": [[200, 10, 20, 20]]}, r"the face \[200, 10, 20, 20\] of --faces lies outside of its 120 x 90 pixels"),
        ({"1.png": [[0.3, 0.3, 0.2, 0.2]]}, "a fraction of the image; write pixels"),
    ):
        write_json(tmp_path / "faces.json", faces)
        refused(words, blur, tmp_path / "photos", tmp_path / words[:9], faces=tmp_path / "faces.json", processes=1)
    write_json(tmp_path / "faces.json", {"1.png": [[0, 0, 0, 0], [100, 80, 50, 50]]})
    blur(tmp_path / "photos", tmp_path / "out", faces=tmp_path / "faces.json", processes=1)


def test_another_chat_template_is_named(make_model, tmp_path, capsys):
    make_model(adapter="mlp2x_gelu").save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    config.pop("locvlm")
    write_json(tmp_path / "config.json", config)  # now somebody else's
    for template, is_named in (("USER: {{ text }} ASSISTANT:", False), ("[INST] {{ text }} [/INST]", True)):
        (tmp_path / "chat_template.jinja").write_text(template)
        LocVLM.from_pretrained(tmp_path)
        assert ("has another chat template; it is asked as LLaVA-1.5 is" in capsys.readouterr().out) == is_named


def test_one_image_in_two_folders_that_are_one(coco, tmp_path):
    """LLaVA's coco/train2017 is often a link to the folder of the other file."""
    (tmp_path / "llava/coco").mkdir(parents=True)
    (tmp_path / "llava/coco/train2017").symlink_to(coco)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    name = read_json(instances(coco / "i.json", 100, 80))["images"][0]["file_name"]
    write_json(tmp_path / "chat.json", [{"id": "a", "image": f"coco/train2017/{name}", "conversations": turns}])
    sources = [(str(coco / "i.json"), str(coco), 1.0), (str(tmp_path / "chat.json"), str(tmp_path / "llava"), 1.0)]
    [record] = [record for record in read_records(sources)[0] if record.conversations]
    assert record.objects


def test_boxes_of_llava_are_of_the_padded_square(capsys):
    record = Record("a", None, (640, 480), conversations=((("Where is it?", "[0.18, 0.41, 0.33, 0.6]"),), (("Who?", "A dog."),)))
    note_fractions([record], "pad")
    note_fractions([replace(record, conversations=())], "squash")
    assert not capsys.readouterr().out
    note_fractions([record], "squash")
    assert capsys.readouterr().out.startswith("note: 1 texts hold boxes as fractions")


def test_a_tag_inside_a_text_is_text(tmp_path):
    """HTML's <video> in a row of ShareGPT; only a tag where LLaVA puts it says that an image is missing."""
    def rows(question, **keys):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Use <video>."}]
        return [{"id": "a", "conversations": turns, **keys}]

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for content in (rows("Does <video> work <image> in HTML?"), rows("<image>\nDoes <video> work?", image="a.png")):
        write_json(tmp_path / "chat.json", content)
        [record] = read_file(tmp_path / "chat.json", str(tmp_path))[0]
        [[(question, answer)]] = record.conversations
        assert "<video>" in question and answer == "Use <video>."
        assert ("<image>" in question) == ("work <image>" in content[0]["conversations"][0]["value"])  # text, without an image
    for question in ("<image>\nWhat?", "What?\n<video>"):
        write_json(tmp_path / "chat.json", rows(question))
        refused("contains <(image|video)> but has no", read_file, tmp_path / "chat.json", str(tmp_path))


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    open_journal(tmp_path / "part-0.jsonl").close()
    lock(tmp_path / "train.json").close()
    assert capsys.readouterr().out.count("this file system has no locks") == 2


def test_a_config_names_what_it_has(tmp_path):
    refused("unknown location 'pont'", LocVLMConfig, location="pont")
    refused("unknown location 'bbox'", Wording, CoordFormat(), location="bbox")
    refused("unknown words 'names'", lambda: LocVLMConfig(words="names"))
    refused("unsupported num_local_experts 64", LlamaConfig.from_dict, {"num_experts": 64})
    refused("unsupported partial_rotary_factor 0.5", LlamaConfig.from_dict, {"rope_parameters": {"partial_rotary_factor": 0.5}})


def test_an_image_one_folder_down_is_pointed_at(tmp_path):
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train2017/1.png")
    assert image_problem(tmp_path / "1.jpg").endswith(f"; {tmp_path} has 'train2017/1.png'")
    assert image_problem(tmp_path / "2.png").endswith("2.png")


def test_a_clip_that_its_row_calls_image(tmp_path):
    """The tag is no text, whichever it is; inside a question, the other tag is."""
    turns = [{"from": "human", "value": "<image>\nIs <image> HTML?"}, {"from": "gpt", "value": "No."}]
    entry = llava_row({"id": "a", "video": "a.mp4", "conversations": turns}, 0)
    assert entry.turns == (("Is <image> HTML?", "No."),)
