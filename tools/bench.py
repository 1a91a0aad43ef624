"""Compare this code with `transformers` (pip install transformers): speed and peak memory, both sides in one run. Linux only.

    python -m tools.bench train       63 M parameters, 6 questions about each of 4 images; some minutes, 10 GB
    python -m tools.bench generate    loading and generation: a LLaMA of SmolLM2-135M's shape, or --llama FOLDER
    python -m tools.bench evaluate    6 questions about each of 4 images at ViT-L/14's 336 px before that LLaMA

Both sides have the same weights, images and questions, in fp32; losses and answers must agree. Each runs in its own process.

images     images in a batch
questions  questions about each image
steps      steps to time, after a first one
tokens     tokens to generate
threads    threads of each process
llama      HF folder, instead of random weights
"""

import random
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.utils.rnn import pad_sequence

import data
from clip_vit import CLIPVisionConfig
from formats.fast_cpu import keep_freed_memory
from formats.files import read_json, write_json
from formats.llava_hf import json_files
from formats.weights import sort_tensors, write_tensors
from llama import Llama, LlamaConfig
from model import LocVLM, LocVLMConfig
from tools import command, positive

SMOLLM2 = read_json(Path(__file__).with_name("smollm2.json"))  # config.json of SmolLM2-135M
ADAPTER = "mlp2x_gelu"  # `transformers` has no other
VISION = CLIPVisionConfig(256, 1024, 6, 4, image_size=224)  # 256 patches, as ViT-L/14 at 224 px
SMALL = LocVLMConfig(VISION, LlamaConfig(32000, 512, 1376, 8, 8), ADAPTER)
LARGE = LocVLMConfig(CLIPVisionConfig(image_size=336), LlamaConfig.from_dict(SMOLLM2), ADAPTER)
NAMES = ("dog", "cup", "traffic light", "orange", "dining table", "person", "bicycle", "laptop")


class StandInTokenizer:
    """Words and single characters -> ids in order of appearance: about as many as LLaMA's pieces."""

    bos_token_id, eos_token_id, ids = 1, 2, {}

    def encode(self, text):
        pieces = re.findall(r"[A-Za-z]+| (?=\d)|\S|\n", text)  # a piece for each digit, and for the space before it
        return [self.ids.setdefault(piece, 3 + len(self.ids)) for piece in pieces]


def random_model(side, config):
    """Make our model of a LocVLMConfig, or theirs, with the same random weights. Return it and {our name: parameter}."""
    if side == "ours":
        model = LocVLM(config)
        named = dict(model.named_parameters())
    else:
        try:
            from transformers import LlavaConfig, LlavaForConditionalGeneration
        except ImportError as error:
            raise ImportError(f"cannot import transformers ({error}), the other side; pip install transformers") from None
        words = config.text_config.vocab_size  # the image placeholder must be one of them: the last
        their_config = LlavaConfig(**json_files(config, StandInTokenizer(), words - 1, words)["config.json"])
        model = LlavaForConditionalGeneration(their_config)
        parts = sort_tensors(dict(model.named_parameters()), "transformers' Llava")
        named = {f"{part}.{name}": p for part, of_part in parts.items() for name, p in of_part.items()}
    draw_weights(named)
    return model, named


def draw_weights(named):
    """Draw every weight, in the order of our names: the same for both sides."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(named.items()):
        noise = torch.randn(p.shape, generator=generator)
        is_scale = p.ndim == 1 and "norm" in name and name.endswith("weight")
        p.data.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1 * noise + is_scale)


def padded(rows, fill, side="right"):
    """Pad lists of ids to one length: a tensor (rows, T)."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill, padding_side=side)


def their_inputs(model, rows, pixels, side="right"):
    """Batch rows of ids and their images for `transformers`, with its own image placeholder."""
    rows = [[model.config.image_token_index if i == data.IMAGE_ID else i for i in row] for row in rows]
    mask = padded([[1] * len(row) for row in rows], 0, side)
    return {"input_ids": padded(rows, 0, side), "attention_mask": mask, "pixel_values": pixels}


def memory(key):
    """Return this process's memory in GiB: `VmRSS` is now, `VmHWM` its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s*(\d+)", status, re.MULTILINE)[1]) / 2**20


def measured(sides, line, call, *args):
    """Call a function for each side, in a process of its own, with its own peak. Print a line of each result; return them."""
    found = {}
    for side in sides:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found[side] = fresh.submit(call, side, *args).result()
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


def make_rows(images, questions, is_packed):
    """Make packed rows and their images: k questions to a row, or each in its own row with its image again."""
    rng, tokenizer, wording = random.Random(0), StandInTokenizer(), data.Wording(SMALL.coord_format())

    def segment():
        box_px = [rng.randrange(*span) for span in ((0, 140), (0, 105), (140, 280), (105, 210))]
        answer = data.LOC_ANSWER.format(loc=wording.place(tuple(box_px), (640, 480)))  # bins of two digits
        return data.encode_segment(tokenizer, "v1", [(data.loc_question(rng.choice(NAMES), wording, rng), answer)])

    prefix = data.encode_prefix(tokenizer, "v1", SMALL.visual_tokens)
    segments = [[segment() for _ in range(questions)] for _ in range(images)]
    pixels = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    if not is_packed:
        segments, pixels = [[one] for row in segments for one in row], pixels.repeat_interleave(questions, dim=0)
    return [data.pack(prefix, row, SMALL.text_config.max_position_embeddings) for row in segments], pixels


def measure_training(side, is_tuned, images, questions, steps, threads):
    """Train one side for some steps, in this process. Theirs reads a row per question, each with its image."""
    if is_tuned:
        keep_freed_memory()
    torch.set_num_threads(threads)
    (rows, pixels), (model, named) = make_rows(images, questions, is_packed=side == "ours"), random_model(side, SMALL)
    if side == "ours":
        inputs = {"pixel_values": pixels, **data.collate(rows)}
    else:
        inputs = their_inputs(model, [row["input_ids"] for row in rows], pixels)
        inputs |= {"labels": padded([row["labels"] for row in rows], data.IGNORE), "use_cache": False}
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

    seconds, (first, *_, last) = clock(step, steps)
    peak, shape = memory("VmHWM"), "{} x {}".format(*inputs["input_ids"].shape)
    return {"seconds": seconds, "peak": peak, "growth": peak - before, "first": first, "last": last, "shape": shape}


def train(images: positive = 4, questions: positive = 6, steps: positive = 5, threads: positive = 2):
    """Compare steps (forward, backward, AdamW; the tower frozen), glibc set to keep freed memory (formats.fast_cpu) or not."""
    print(f"{questions} questions about each of {images} images, fp32, {threads} threads; median of {steps} steps")
    print("allocator  side    rows x tokens  s / step  peak GiB  over start GiB  loss at first, last step")
    line = "  {side:6}  {shape:>13}  {seconds:8.2f}  {peak:8.2f}  {growth:14.2f}  {first:.4f}, {last:.4f}"
    sides, how = ("theirs", "ours"), (images, questions, steps, threads)
    for is_tuned, name in ((True, "tuned"), (False, "default")):
        theirs, ours = measured(sides, f"{name:9}" + line, measure_training, is_tuned, *how).values()
        assert abs(theirs["first"] - ours["first"]) < 5e-5, "the first losses differ"
        seconds, peak, growth = (ours[key] / theirs[key] for key in ("seconds", "peak", "growth"))
        print(f"{name:9}  {1 / seconds:.2f} x as fast (goal: at least 4.5), {peak:.3f} of the peak (goal: at most 0.28), "
              f"{growth:.3f} of what the steps add", flush=True)  # fmt: skip


# ----- loading and generation


def write_llama(folder):
    """Write a random LLaMA of SmolLM2-135M's shape as a HF folder."""
    write_json(folder / "config.json", SMOLLM2)
    named = {f"model.{name}": p for name, p in Llama(LARGE.text_config).named_parameters()}  # a tied head is not among them
    draw_weights(named)
    write_tensors(folder / "model.safetensors", named)


@torch.inference_mode()
def measure_generation(side, folder, tokens, threads):
    """Load a folder and generate, in this process: seconds, GiB, and the ids of one answer."""
    torch.set_num_threads(threads)
    if side == "theirs":
        from transformers import LlamaForCausalLM  # imported before the clock starts
    before, began, dtype = memory("VmHWM"), time.perf_counter(), torch.bfloat16 if side == "bf16" else torch.float32
    model = (LlamaForCausalLM if side == "theirs" else Llama).from_pretrained(folder, dtype=dtype)
    load, peak = time.perf_counter() - began, memory("VmHWM") - before
    size = sum(p.nbytes for p in model.parameters())
    # a token reads every weight, but only one row of the embeddings, unless the head is tied to them
    moved = size - (not model.config.tie_word_embeddings) * model.lm_head.weight.nbytes
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
        first, more = (clock(lambda n=n, rows=rows: answer(prompts[:rows], n))[0] for n in (1, 1 + tokens))
        found[name] = rows * tokens / (more - first)  # tokens per second
    return found | {"limit": clock(torch.ones(moved // 4).sum, times=9)[0] * found["one"]}


def generate(tokens: positive = 32, threads: positive = 2, llama=None):
    """Compare loading and greedy generation. "Of limit": the time to sum the bytes that a token reads, by its own time."""
    line = "{side:8}  {load:6.2f}  {memory:12.2f}  {prefill:11.2f}  {one:15.1f}  {limit:8.0%}  {eight:16.1f}"
    with TemporaryDirectory() as made:
        folder = Path(llama or made)
        if not llama:
            write_llama(folder)
        print(f"{folder}: fp32, {threads} threads")
        print("side      load s  peak/tensors  prefill 600  tokens/s, 1 row  of limit  tokens/s, 8 rows")
        found = measured(("theirs", "ours", "compiled", "bf16"), line, measure_generation, folder, tokens, threads)
    theirs = found.pop("theirs")
    for side, ours in found.items():
        assert side == "bf16" or ours["answer"] == theirs["answer"], f"{side}: the answer differs from transformers'"
        load, prefill = (theirs[key] / ours[key] for key in ("load", "prefill"))
        one, eight = (ours[key] / theirs[key] for key in ("one", "eight"))
        print(f"{side}: {load:.1f} x as fast to load, {prefill:.1f} x prefill, {one:.1f} x one row (goal: 2), "
              f"{eight:.1f} x eight rows (goal: 2)")  # fmt: skip


# ----- evaluation


@torch.inference_mode()
def measure_evaluation(side, images, questions, tokens, threads):
    """Answer questions, in this process: ours all at a time, theirs as many rows as `side` says. Return seconds and answers."""
    torch.set_num_threads(threads)
    model, _ = random_model(side, LARGE)
    tokenizer, draw, wording = StandInTokenizer(), random.Random(0), data.Wording(LARGE.coord_format())
    prefix = data.encode_prefix(tokenizer, "v1", LARGE.visual_tokens)
    pixels = torch.randn(images, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    asked = [[data.loc_question(draw.choice(NAMES), wording, draw) for _ in range(questions)] for _ in pixels]
    tokenizer.eos_token_id, tokenizer.decode = None, str  # no answer ends; they are compared token by token
    if side == "ours":
        model.tokenizer = tokenizer
        model.for_inference()
    else:
        model.generation_config.eos_token_id = None

    def answer(asked):
        """Answer questions about the first images: the ids of each answer as text."""
        if side == "ours":
            return [text for of_image in model.generate(list(pixels[: len(asked)]), asked, tokens) for text in of_image]
        size, answers = int(side.split()[1]), []
        rows = [(i, data.encode_question(tokenizer, text)) for i, of_image in enumerate(asked) for text in of_image]
        for start in range(0, len(rows), size):
            image_of, ids = zip(*rows[start : start + size], strict=True)
            inputs = their_inputs(model, [prefix + row for row in ids], pixels[list(image_of)], side="left")
            answered = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
            answers += map(str, answered[:, inputs["input_ids"].shape[1] :].tolist())
        return answers

    answer([asked[0][:1]])  # not timed
    began = time.perf_counter()
    return {"answers": answer(asked), "seconds": time.perf_counter() - began, "peak": memory("VmHWM")}


def evaluate(images: positive = 4, questions: positive = 6, tokens: positive = 32, threads: positive = 2):
    """Compare evaluation: theirs reads as many rows at a time as our batch has questions, then as it has images."""
    total = images * questions
    print(f"{images} images, {total} questions, {tokens} tokens each, fp32, {threads} threads")
    sides, how = ("ours", f"theirs, {total} rows", f"theirs, {images} rows"), (images, questions, tokens, threads)
    found = measured(sides, "{side:16}  {seconds:8.2f} s  {peak:6.2f} GiB", measure_evaluation, *how)
    ours = found.pop("ours")
    for side, theirs in found.items():
        differ = sum(one != other for one, other in zip(ours["answers"], theirs["answers"], strict=True))
        speed = theirs["seconds"] / ours["seconds"]
        print(f"{speed:.1f} x as fast as {side} at a time (goal: 5); {differ} of {total} answers differ")


main = command(__name__, train, generate, evaluate)
