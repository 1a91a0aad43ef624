"""Compare this code with `transformers` (pip install transformers): speed and peak memory, both sides in one run. Linux only.

    python -m tools.bench train       63 M parameters, 6 questions about each of 4 images; some minutes, 10 GB
    python -m tools.bench generate    loading, and generation from text alone: a LLaMA of SmolLM2-135M's shape
    python -m tools.bench evaluate    6 questions about each of 4 images at ViT-L/14's 336 px before that LLaMA

Both sides read one folder of random weights, in fp32, and the same questions; no loss and no answer may differ (but in bf16).
Each side runs in its own process. The last lines divide our figures by theirs.

images     images in a batch
questions  questions about each image
steps      steps to time, after a first one
tokens     tokens to generate
threads    threads of each process
"""

import gc
import random
import re
import statistics
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.utils.rnn import pad_sequence

import data
from clip_vit import CLIPVisionConfig
from formats.fast_cpu import keep_freed_memory
from llama import LlamaConfig, read_tokenizer
from model import LocVLM, LocVLMConfig
from tools import command, positive
from tools.plan import made_row

TINY_LLAMA = Path(__file__).parent.parent / "tiny/llama"  # its tokenizer makes about as many pieces of a question as LLaMA's
ADAPTER = "mlp2x_gelu"  # `transformers` has no other
VISION = CLIPVisionConfig(256, 1024, 6, 4, image_size=224)  # 256 patches, as ViT-L/14 at 224 px
SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True)
TRAINED = LocVLMConfig(VISION, LlamaConfig(32000, 512, 1376, 8, 8), ADAPTER)
GENERATING = LocVLMConfig(VISION, SMOLLM2, ADAPTER)
EVALUATED = LocVLMConfig(CLIPVisionConfig(image_size=336), SMOLLM2, ADAPTER)
NAMES = ("dog", "cup", "traffic light", "orange", "dining table", "person", "bicycle", "laptop")


def compare(measure, config, sides, threads, **options):
    """Measure every side in a process of its own, with its own peak. Print its figures, then ours divided by theirs.

    measure(side, folder of a model, **options) -> ({name: figure}, answers, the same on all sides)
    """
    found = {}
    with TemporaryDirectory() as folder:
        write_random_model(config, folder)
        for side in sides:
            with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as fresh:
                found[side] = fresh.submit(measure, side, folder, **options).result()
            print(f"{side}: " + ", ".join(f"{value:.3g} {name}" for name, value in found[side][0].items()), flush=True)
    for ours, theirs in product(sides, sides):
        if ours.startswith("ours") and theirs.startswith("theirs"):
            (figures, answers), (their_figures, their_answers) = found[ours], found[theirs]
            differ = sum(one != other for one, other in zip(answers, their_answers, strict=True))
            ratios = ", ".join(f"{value / their_figures[name]:.3g} x {name}" for name, value in figures.items())
            print(f"{ours} / {theirs}: {ratios}; {differ} of {len(answers)} answers differ", flush=True)


def write_random_model(config, folder):
    torch.manual_seed(0)
    model = LocVLM(config)
    for p in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    model.tokenizer = read_tokenizer(TINY_LLAMA)
    model.save_pretrained(folder)


def load(side, folder, dtype=torch.float32):
    """Open a folder as our model or as theirs: (the model, whose answers do not end; seconds; GiB of the process before)."""
    Model = LocVLM
    if side.startswith("theirs"):
        try:
            from transformers import LlavaForConditionalGeneration as Model  # before the clock starts
        except ImportError as error:
            raise ImportError(f"cannot import transformers ({error}), the other side; pip install transformers") from None
    before, began = memory("VmRSS"), time.perf_counter()
    model = Model.from_pretrained(folder, dtype=dtype)
    seconds = time.perf_counter() - began
    if Model is LocVLM:
        model.tokenizer.eos_token_id, model.tokenizer.decode = None, str  # answers are compared token by token
    else:
        model.generation_config.eos_token_id = None
    return model, seconds, before


def memory(key):
    """Return this process's memory in GiB: `VmRSS` is now, `VmHWM` its peak."""
    return int(re.search(rf"^{key}:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 2**20


def clock(call, times=3):
    """Return the median seconds of a call, after one that does not count. The garbage collector runs, as in training."""
    return statistics.median(timeit.repeat(call, gc.enable, number=1, repeat=1 + times)[1:])


def random_images(config, count):
    """Draw preprocessed images: (count, 3, S, S)."""
    side = config.vision_config.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def their_inputs(model, rows, pixels=None):
    """Batch rows of ids and their images for `transformers`: padding on the left, its own image placeholder."""
    rows = [torch.tensor(row) for row in rows]
    ids, mask = (pad_sequence(part, True, padding_side="left") for part in (rows, [torch.ones_like(row) for row in rows]))
    ids = ids.masked_fill(ids == data.IMAGE_ID, model.config.image_token_index)
    return {"input_ids": ids, "attention_mask": mask} | ({"pixel_values": pixels} if torch.is_tensor(pixels) else {})


def their_answers(model, rows, count, pixels=None):
    """Continue rows of ids greedily."""
    inputs = their_inputs(model, rows, pixels)
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def measure_training(side, folder, allocator, images, questions, steps):
    """Train one side for some steps. Ours reads a row per image, theirs a row per question, each with its image."""
    if allocator == "tuned":
        keep_freed_memory()
    model, _, before = load(side, folder)
    pixels = random_images(TRAINED, images)
    if side == "ours":
        inputs = {"pixel_values": pixels, **data.collate([made_row(TRAINED, 2, questions)] * images)}
    else:
        row = made_row(TRAINED, 2, 1)
        inputs = their_inputs(model, [row["input_ids"]] * images * questions, pixels.repeat_interleave(questions, dim=0))
        inputs |= {"labels": torch.tensor([row["labels"]] * images * questions), "use_cache": False}
    learned = [p for name, p in model.named_parameters() if p.requires_grad_("vision_tower." not in name).requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=2e-5, fused=True), []

    def step():
        loss = model(**inputs) if side == "ours" else model(**inputs).loss  # and not the rest, which holds the logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    speed, peak = 1 / clock(step, steps), memory("VmHWM")
    return {"steps/s": speed, "GiB at the peak": peak, "GiB over the start": peak - before}, [f"{losses[0]:.3f}"]


def train(images: positive = 4, questions: positive = 6, steps: positive = 5, threads: positive = 2):
    """Compare steps (forward, backward, AdamW; the tower frozen), glibc tuned to keep freed memory (formats.fast_cpu), then as
    it comes. The goal: at least 4.5 times the speed in 0.28 of the peak."""
    options = {"images": images, "questions": questions, "steps": steps}
    for allocator in ("tuned", "default"):
        print(f"allocator: {allocator}")
        compare(measure_training, TRAINED, ("theirs", "ours"), threads, allocator=allocator, **options)


@torch.inference_mode()
def measure_generation(side, folder, tokens):
    """Load, and continue prompts of one length greedily."""
    model, seconds, before = load(side, folder, torch.bfloat16 if side == "ours, bf16" else torch.float32)
    peak, size = memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**30
    if side == "theirs":
        answer = partial(their_answers, model)
    else:
        answer = model.for_inference(compile=side == "ours, compiled").language_model.generate
    draw = random.Random(0)
    # the longer prompt is about an image at 336 px and the words before it
    *prompts, long = ([draw.randrange(3, 400) for _ in range(length)] for length in [32] * 8 + [600])
    answers = answer(prompts[:1], 16)
    figures = {"GiB loaded/s": size / seconds, "of their size taken by loading": peak / size}
    figures["prefill tokens/s"] = len(long) / clock(lambda: answer([long], 1))
    for rows in (1, 8):
        first, more = (clock(lambda n=n, rows=rows: answer(prompts[:rows], n)) for n in (1, 1 + tokens))
        figures[f"tokens/s (rows: {rows})"] = rows * tokens / (more - first)
    limit = clock(torch.ones(int(size * 2**28)).sum, times=9)  # seconds to sum about as many bytes as a token reads
    return figures | {"of the speed of memory (rows: 1)": limit * figures["tokens/s (rows: 1)"]}, answers


def generate(tokens: positive = 32, threads: positive = 2):
    """Compare loading and greedy generation. The goal: twice the tokens/s, of one row and of eight."""
    compare(measure_generation, GENERATING, ("theirs", "ours", "ours, compiled", "ours, bf16"), threads, tokens=tokens)


@torch.inference_mode()
def measure_evaluation(side, folder, images, questions, tokens):
    """Answer questions: ours all at a time, theirs as many rows as `side` says."""
    model, *_ = load(side, folder)
    pixels, tokenizer, draw = random_images(EVALUATED, images), read_tokenizer(folder), random.Random(0)
    prefix, wording = data.encode_prefix(tokenizer, "v1", EVALUATED.visual_tokens), data.Wording(EVALUATED.coord_format())
    asked = [[data.loc_question(draw.choice(NAMES), wording, draw) for _ in range(questions)] for _ in range(images)]
    if side == "ours":
        model.for_inference()

    def answer(asked):
        """Answer questions about the first images: the ids of each answer as text."""
        if side == "ours":
            return [text for of_image in model.generate(list(pixels[: len(asked)]), asked, tokens) for text in of_image]
        size, answers = int(side.split()[1]), []
        rows = [(i, data.encode_question(tokenizer, text)) for i, of_image in enumerate(asked) for text in of_image]
        for start in range(0, len(rows), size):
            image_of, ids = zip(*rows[start : start + size], strict=True)
            answers += map(str, their_answers(model, [prefix + row for row in ids], tokens, pixels[list(image_of)]))
        return answers

    answer([asked[0][:1]])  # not timed
    began = time.perf_counter()
    answers = answer(asked)
    return {"questions/s": len(answers) / (time.perf_counter() - began), "GiB at the peak": memory("VmHWM")}, answers


def evaluate(images: positive = 4, questions: positive = 6, tokens: positive = 32, threads: positive = 2):
    """Compare answering: theirs as many rows at a time as there are questions, then images. The goal: 5 times the speed."""
    sides = ("ours", f"theirs, {images * questions} rows at a time", f"theirs, {images} rows at a time")
    compare(measure_evaluation, EVALUATED, sides, threads, images=images, questions=questions, tokens=tokens)


main = command(__name__, train, generate, evaluate)
