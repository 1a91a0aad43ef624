"""How fast training runs: operations per second, and the share of time that the device waits for data."""

import time

import torch

# operations per second that a GPU is sold with, bf16, dense; the first name that the GPU's contains
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "NVL": 835e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}


def step_flops(config, stage, images, rows, length, answers, runs_tower=True):
    """Count the operations of a forward and backward pass over images, and rows of `length` tokens with `answers` in all.
    Two per weight, token and pass: forward, the gradient that passes through, and the weight's own gradient if it learns.
    Attention counts as if nothing were masked; recomputation does not count."""
    v, t = config.vision_config, config.text_config
    passes, patches = 3 if stage in (2, 4) else 2, v.num_patches + 1
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    per_patch = (2 * block + 4 * patches * v.hidden_size) * (v.num_hidden_layers - 1) + 6 * v.patch_size**2 * v.hidden_size
    adapter = 2 * 2 * v.hidden_size * t.hidden_size + (config.adapter != "linear") * 3 * 2 * t.hidden_size**2
    heads, kv_heads = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    layer = 2 * t.hidden_size * (heads + kv_heads) + 3 * t.hidden_size * t.intermediate_size
    layers = (passes * 2 * layer + 3 * 4 * length * heads) * t.num_hidden_layers
    head = passes * 2 * t.hidden_size * t.vocab_size * answers
    image = runs_tower * patches * per_patch + config.visual_tokens * adapter
    return images * image + rows * length * layers + head


class Meter:
    """Measures one stage in this process."""

    def __init__(self, config, stage, device, runs_tower):
        self.config, self.stage, self.runs_tower = config, stage, runs_tower
        gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
        self.peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
        self.flops, self.waited, self.began = 0, 0.0, time.time()

    def waiting(self, batches):
        """Pass batches on, and measure how long each made us wait."""
        since = time.time()
        for batch in batches:
            self.waited += time.time() - since
            yield batch
            since = time.time()

    def count(self, batch):
        size = len(batch["pixel_values"]), *batch["input_ids"].shape, batch["targets"].shape[1]
        self.flops += step_flops(self.config, self.stage, *size, self.runs_tower)

    def row(self):
        """Return what the log keeps of a step: times since the stage began, and speed (mfu: share of the GPU's peak)."""
        speed = self.flops / (seconds := time.time() - self.began)
        row = {"seconds": round(seconds, 2), "waited": round(self.waited, 2), "tflops": round(speed / 1e12, 3)}
        return {**row, "mfu": self.peak and round(speed / self.peak, 4)}

    def summary(self):
        row, waited = self.row(), self.waited / (time.time() - self.began)
        share = f", {row['mfu']:.1%} of the GPU's peak" if self.peak else ""
        return f"stage {self.stage}: {row['tflops']:.3f} TFLOP/s in each process{share}; waited for data {waited:.1%} of the time"
