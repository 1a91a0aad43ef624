"""Compare this code with `transformers` (pip install transformers): speed and peak memory, both sides in one run. Linux only.

    python -m tools.bench             training: 63 M parameters, 6 questions about each of 4 images; some minutes, 10 GB
    python -m tools.bench generate    loading and generation: a LLaMA of SmolLM2-135M's shape, or --llama FOLDER
    python -m tools.bench evaluate    evaluation: 6 questions about each of 4 images at ViT-L/14's 336 px, or --run RUN

Both sides have the same weights, images and questions, in fp32; losses and answers must agree.
Training: forward, backward and AdamW, the tower frozen, with glibc's allocator set to keep freed memory (formats.fast_cpu) or
not. Theirs reads a row per question, each with its image. The first step is not timed. Generation: greedy; "of limit" is the
time to sum the bytes that a token reads, as a share of its time. Evaluation: theirs reads as many rows at a time as our batch
has questions, then as it has images. The random model never ends an answer.
"""

import argparse
import random
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import data
from clip_vit import CLIPVisionConfig, open_image, preprocess
from coords import CoordFormat
from evaluate import ITEMS
from formats.annotations import read_file
from formats.fast_cpu import keep_freed_memory
from formats.files import run_command, write_json
from formats.weights import write_tensors
from llama import Llama, LlamaConfig
from model import LocVLM, LocVLMConfig
from tiny.shapes import ensure_world

VISION = CLIPVisionConfig(256, 1024, 6, 4, image_size=224)  # 256 patches, as ViT-L/14 at 224 px
VIT_L = CLIPVisionConfig(image_size=336)
SMOLLM2 = {  # config.json of SmolLM2-135M
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "model_type": "llama", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
NAMES = ("dog", "cup", "traffic light", "orange", "dining table", "person", "bicycle", "laptop")
OPTIONS = {
    "images": (4, "images in a batch"), "questions": (6, "questions about each image"), "layers": (8, "layers of LLaMA"),
    "hidden-size": (512, "its width, a multiple of 64"), "vocab-size": (32000, "its vocabulary"),
    "steps": (5, "steps to time, after a first one"), "threads": (2, "threads of each process"),
    "tokens": (32, "tokens to generate, for `evaluate` at most"), "batches": (1, "batches of images for `evaluate`"),
}  # fmt: skip


class StandInTokenizer:
    """Words and single characters -> ids in order of appearance: about as many as LLaMA's pieces."""

    bos_token_id, eos_token_id, ids = 1, 2, {}

    def encode(self, text):
        pieces = re.findall(r"[A-Za-z]+| (?=\d)|\S|\n", text)  # a piece for each digit, and for the space before it
        return [self.ids.setdefault(piece, 3 + len(self.ids)) for piece in pieces]


def their_llava(config):
    """Make `transformers`' Llava of our config. Its image placeholder must be in the vocabulary: the last word."""
    try:
        from transformers import LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise ImportError(f"cannot import transformers ({error}), the other side; pip install transformers") from None
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vars(config.vision_config)},
        text_config={"model_type": "llama", **vars(config.text_config)},
        image_token_index=config.text_config.vocab_size - 1, projector_hidden_act="gelu",
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    ))  # fmt: skip


def named_weights(model):
    """Return the parameters of either side under our names."""
    named = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")  # older versions
        named[re.sub("^lm_head", "language_model.lm_head", name).replace("multi_modal_projector.", "adapter.")] = p
    return named


def draw_weights(named):
    """Draw every weight, in the order of our names: both sides get the same, without a second copy in memory."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(named.items()):
        noise = torch.randn(p.shape, generator=generator)
        is_scale = p.ndim == 1 and "norm" in name and name.endswith("weight")
        p.data.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1 * noise + is_scale)


def padded(rows, fill, left=False):
    """Pad lists of ids to one length: a tensor (rows, T)."""
    fills = [[fill] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, fills, strict=True)])


def their_inputs(rows, pixels, placeholder, left=False):
    """Batch rows of ids and their images for `transformers`, with its own image placeholder."""
    rows = [[placeholder if i == data.IMAGE_ID else i for i in row] for row in rows]
    mask = padded([[1] * len(row) for row in rows], 0, left)
    return {"input_ids": padded(rows, 0, left), "attention_mask": mask, "pixel_values": pixels}


def memory(key):
    """Return this process's memory in GiB: `VmRSS` is now, `VmHWM` its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s*(\d+)", status, re.MULTILINE)[1]) / 2**20


def in_own_process(call, *args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(call, *args).result()


def measured(sides, line, call, *args):
    """Call a function for each side, in a process of its own, with its own peak. Print a line of each result; return them."""
    found = {}
    for side in sides:
        found[side] = in_own_process(call, side, *args)
        print(line.format(side=side, **found[side]), flush=True)
    return found


def clock(call, times=3):
    """Return the median seconds of a call, after one that does not count, and the results of all."""
    seconds, results = [], []
    for _ in range(1 + times):
        began = time.perf_counter()
        results.append(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]), results


# ----- training


def make_rows(args, is_packed):
    """Make the packed rows and their images: k questions to a row, or each in its own row with its image again."""
    rng, tokenizer, wording = random.Random(0), StandInTokenizer(), data.Wording(CoordFormat("ivb", VISION.image_size))

    def segment():
        box_px = [rng.randrange(*span) for span in ((0, 140), (0, 105), (140, 280), (105, 210))]
        answer = data.LOC_ANSWER.format(loc=wording.place(tuple(box_px), (640, 480)))  # bins of two digits
        return data.encode_segment(tokenizer, "v1", [(data.loc_question(rng.choice(NAMES), wording, rng), answer)])

    prefix = data.encode_prefix(tokenizer, "v1", VISION.num_patches)
    segments = [[segment() for _ in range(args.questions)] for _ in range(args.images)]
    images = torch.randn(args.images, 3, *2 * [VISION.image_size], generator=torch.Generator().manual_seed(1))
    if not is_packed:
        segments, images = [[one] for row in segments for one in row], images.repeat_interleave(args.questions, dim=0)
    return [data.pack(prefix, row, LlamaConfig.max_position_embeddings) for row in segments], images


def measure_training(side, is_tuned, args):
    """Train one side for some steps, in this process."""
    if is_tuned:
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    width = args.hidden_size
    text = LlamaConfig(args.vocab_size, width, -(-width * 8 // 3 // 32) * 32, args.layers, width // 64)  # LLaMA's 8/3
    config = LocVLMConfig(VISION, text, "mlp2x_gelu")  # `transformers` has no other adapter
    rows, images = make_rows(args, is_packed=side == "ours")
    if side == "ours":
        model, inputs = LocVLM(config), {"pixel_values": images, **data.collate(rows)}
    else:
        model, inputs = their_llava(config), their_inputs([row["input_ids"] for row in rows], images, args.vocab_size - 1)
        inputs |= {"labels": padded([row["labels"] for row in rows], data.IGNORE), "use_cache": False}
    named = named_weights(model)
    draw_weights(named)
    for name, p in named.items():
        p.requires_grad_(not name.startswith("vision_tower."))
    optimizer = torch.optim.AdamW([p for p in named.values() if p.requires_grad], lr=2e-5, fused=True)
    before = memory("VmRSS")

    def step():
        out = model(**inputs)
        loss = out if side == "ours" else out.loss
        del out  # theirs holds the logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    seconds, (first, *_, last) = clock(step, args.steps)
    peak, shape = memory("VmHWM"), "{} x {}".format(*inputs["input_ids"].shape)
    found = {"seconds": seconds, "peak": peak, "growth": peak - before, "first": first, "last": last, "shape": shape}
    return found | {"size": sum(p.numel() for p in named.values()) / 1e6}


def training(args):
    """Print both sides' steps, and the ratios."""
    print(f"{args.questions} questions about each of {args.images} images, fp32, {args.threads} threads; forward, backward and "
          f"AdamW, median of {args.steps} steps")  # fmt: skip
    print("allocator  side    parameters  rows x tokens  s / step  peak GiB  over start GiB  loss at first, last step")
    line = "  {side:6}  {size:8.1f} M  {shape:>13}  {seconds:8.2f}  {peak:8.2f}  {growth:14.2f}  {first:.4f}, {last:.4f}"
    for is_tuned, name in ((True, "tuned"), (False, "default")):
        theirs, ours = measured(("theirs", "ours"), f"{name:9}" + line, measure_training, is_tuned, args).values()
        assert abs(theirs["first"] - ours["first"]) < 5e-5, "the first losses differ"
        seconds, peak, growth = (ours[key] / theirs[key] for key in ("seconds", "peak", "growth"))
        print(f"{name:9}  {1 / seconds:.2f} x as fast (goal: at least 4.5), {peak:.3f} of the peak (goal: at most 0.28), "
              f"{growth:.3f} of what the steps add", flush=True)  # fmt: skip


# ----- loading and generation


def write_llama(folder):
    """Write a random LLaMA of SmolLM2-135M's shape as a HF folder."""
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **SMOLLM2})
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_dict(SMOLLM2))
    named = {f"model.{k}": torch.empty(v.shape) for k, v in llama.state_dict().items() if k != "lm_head.weight"}
    draw_weights(named)
    write_tensors(folder / "model.safetensors", named)


@torch.inference_mode()
def measure_generation(side, folder, args):
    """Load a folder and generate, in this process: seconds, GiB, and the ids of one answer."""
    torch.set_num_threads(args.threads)
    if side == "theirs":
        from transformers import LlamaForCausalLM  # imported before the clock starts
    before, began, dtype = memory("VmHWM"), time.perf_counter(), torch.bfloat16 if side == "bf16" else torch.float32
    model = (LlamaForCausalLM if side == "theirs" else Llama).from_pretrained(folder, dtype=dtype)
    load, peak = time.perf_counter() - began, memory("VmHWM") - before
    size = sum(p.nbytes for p in model.parameters())
    # a token reads every weight, but only one row of the embeddings, unless the head is tied to them
    is_tied = model.lm_head.weight is (model.model if side == "theirs" else model).embed_tokens.weight
    moved = size - (not is_tied) * model.lm_head.weight.nbytes
    if side != "theirs":
        model.for_inference(compile=side == "compiled")

    def answer(prompts, count):
        """Continue prompts of one length greedily."""
        if side != "theirs":
            return model.generate(prompts, count)
        ids = torch.tensor(prompts)
        fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[:, ids.shape[1] :].tolist()

    draw = random.Random(0)
    # the longer prompt is about an image at 336 px and the words before it
    *prompts, long = ([draw.randrange(3, 400) for _ in range(length)] for length in [32] * 8 + [600])
    found = {"load": load, "memory": peak / size * 2**30, "answer": answer(prompts[:1], 16)[0]}
    found["prefill"] = clock(lambda: answer([long], 1))[0]
    for name, rows in (("one", 1), ("eight", 8)):
        first, more = (clock(lambda n=n, rows=rows: answer(prompts[:rows], n))[0] for n in (1, 1 + args.tokens))
        found[name] = rows * args.tokens / (more - first)  # tokens per second
    return found | {"limit": clock(torch.ones(moved // 4).sum, times=9)[0] * found["one"]}


def generation(args):
    """Print both sides' loading and generation, and the ratios."""
    line = "{side:8}  {load:6.2f}  {memory:12.2f}  {prefill:11.2f}  {one:15.1f}  {limit:8.0%}  {eight:16.1f}"
    with TemporaryDirectory() as made:
        folder = Path(args.llama or made)
        if not args.llama:
            write_llama(folder)
        print(f"{folder}: fp32, {args.threads} threads")
        print("side      load s  peak/tensors  prefill 600  tokens/s, 1 row  of limit  tokens/s, 8 rows")
        found = measured(("theirs", "ours", "compiled", "bf16"), line, measure_generation, folder, args)
    theirs = found.pop("theirs")
    for side, ours in found.items():
        assert side == "bf16" or ours["answer"] == theirs["answer"], f"{side}: the answer differs from transformers'"
        load, prefill = (theirs[key] / ours[key] for key in ("load", "prefill"))
        one, eight = (ours[key] / theirs[key] for key in ("one", "eight"))
        print(f"{side}: {load:.1f} x as fast to load, {prefill:.1f} x prefill, {one:.1f} x one row (goal: 2), "
              f"{eight:.1f} x eight rows (goal: 2)")  # fmt: skip


# ----- evaluation


def stand_in(args):
    """Make ours and theirs with the same random weights, and questions: a list of (pixels (3, S, S), questions)."""
    config = LocVLMConfig(VIT_L, LlamaConfig.from_dict(SMOLLM2), "mlp2x_gelu")
    theirs, ours = their_llava(config).eval(), LocVLM(config).eval()
    named = named_weights(theirs)
    draw_weights(named)
    for name, p in ours.named_parameters():
        p.data = named[name].data
    ours.tokenizer, theirs.generation_config.eos_token_id = StandInTokenizer(), None
    ours.tokenizer.eos_token_id = None  # so no answer ends
    draw, noise, wording = random.Random(0), torch.Generator().manual_seed(1), data.Wording(config.coord_format())
    images = torch.randn(args.images * args.batches, 3, *2 * [VIT_L.image_size], generator=noise)
    return ours, theirs, [
        (pixels, [data.loc_question(draw.choice(NAMES), wording, draw) for _ in range(args.questions)]) for pixels in images
    ]  # fmt: skip


def of_run(args):
    """Load a run on both sides, with some of evaluate.py's questions about each held-out shapes image."""
    from transformers import LlavaForConditionalGeneration

    ours = LocVLM.from_pretrained(args.run).eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(args.run, dtype=torch.float32).eval()
    config, world, by_image, draw = ours.config, ensure_world(), {}, random.Random(0)
    records, _ = read_file(world / "instances_val.json", world / "images")
    for make in ITEMS.values():
        for item in make(records, data.Wording(config.coord_format()), random.Random(0)):
            by_image.setdefault(item.image, []).append(item.question)
    enough = [(path, questions) for path, questions in by_image.items() if len(questions) >= args.questions]
    return ours, theirs, [
        (preprocess(open_image(path), config.vision_config, config.geometry), draw.sample(questions, args.questions))
        for path, questions in enough[: args.images * args.batches]
    ]  # fmt: skip


def answer_theirs(model, rows, size, count, end):
    """Answer rows (pixels, ids) with `transformers`, `size` of them at a time: lists of ids up to the end token."""
    answers = []
    for start in range(0, len(rows), size):
        pixels, ids = zip(*rows[start : start + size], strict=True)
        inputs = their_inputs(ids, torch.stack(pixels), model.config.image_token_index, left=True)
        answered = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
        answers += [row[: (row + [end]).index(end)] for row in answered[:, inputs["input_ids"].shape[1] :].tolist()]
    return answers


def logit_gap(model, row, one, other, end):
    """Return the difference of the logits of the first two tokens that differ between two answers to a row."""
    (pixels, ids), pairs = row, list(zip([*one, end], [*other, end], strict=False))
    at = next(i for i, (first, second) in enumerate(pairs) if first != second)
    logits = model(**their_inputs([ids + one[:at]], pixels[None], model.config.image_token_index)).logits[0, -1]
    return abs(float(logits[pairs[at][0]] - logits[pairs[at][1]]))


@torch.inference_mode()
def evaluation(args):
    """Print the seconds of both sides, the ratios, and every answer that differs."""
    torch.set_num_threads(args.threads)
    ours, theirs, asked = (of_run if args.run else stand_in)(args)
    tokenizer, end = ours.tokenizer, ours.tokenizer.eos_token_id
    tokenizer.decode = lambda ids: " ".join(map(str, ids))  # answers are compared token by token
    ours.for_inference()
    prefix = data.encode_prefix(tokenizer, "v1", ours.config.visual_tokens)

    def rows_of(part):
        return [(pixels, prefix + data.encode_question(tokenizer, q)) for pixels, questions in part for q in questions]

    def answer_ours(part):
        answers = ours.generate(*map(list, zip(*part, strict=True)), args.tokens)
        return [list(map(int, answer.split())) for of_image in answers for answer in of_image]

    whole, differ, tokens = args.images * args.questions, 0, 0
    sides = {f"ours, {args.images} images and {whole} questions at a time": answer_ours}
    for size in args.rows or (whole, args.images):
        theirs_of = partial(answer_theirs, theirs, size=size, count=args.tokens, end=end)
        sides[f"theirs, {size} rows at a time"] = lambda part, answer=theirs_of: answer(rows_of(part))
    seconds = dict.fromkeys(sides, 0.0)
    for answer in sides.values():
        answer([(asked[0][0], asked[0][1][:1])])
    for start in range(0, len(asked), args.images):
        part, answers = asked[start : start + args.images], {}
        for side, answer in sides.items():
            began = time.perf_counter()
            answers[side] = answer(part)
            seconds[side] += time.perf_counter() - began
        (_, of_ours), *of_theirs = answers.items()
        tokens += sum(map(len, of_ours))
        for side, others in of_theirs:
            for row, one, other in zip(rows_of(part), of_ours, others, strict=True):
                if one != other:
                    differ += 1
                    print(f"answers differ: {side}, logits {logit_gap(theirs, row, one, other, end):.1e} apart")
    total, our_seconds = sum(len(questions) for _, questions in asked), next(iter(seconds.values()))
    print(f"{args.run or 'random weights'}: {len(asked)} images, {total} questions, {tokens / total:.1f} tokens each, fp32, "
          f"{args.threads} threads; {differ} of {(len(sides) - 1) * total} answers of theirs differ from ours")  # fmt: skip
    for side, taken in seconds.items():
        print(f"{side:42}  {taken:8.2f} s  {total / taken:8.2f} questions/s  {taken / our_seconds:5.1f} x (goal: 5)")


def main(argv=None):
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], **how)
    whats = {"train": training, "generate": generation, "evaluate": evaluation}
    parser.add_argument("what", nargs="?", choices=whats, default="train", help="what to measure")
    parser.add_argument("--llama", help="HF folder for `generate`, instead of random weights")
    parser.add_argument("--run", help="run folder for `evaluate`, instead of random weights")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of `transformers` at a time, instead of the two")
    for name, (default, what) in OPTIONS.items():
        parser.add_argument("--" + name, type=int, default=default, help=what)
    args = parser.parse_args(argv)
    whats[args.what](args)


if __name__ == "__main__":
    run_command("tools.bench", main)
