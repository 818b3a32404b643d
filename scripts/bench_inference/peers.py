"""One turn of an engine that ferropt is compared with, in a process of its own: it loads, is timed, and prints JSON.

  PYTHON scripts/bench_inference/peers.py PEER MODEL WEIGHTS THREADS RUNS NEW

MODEL is a folder as prepare.py makes it. Each engine gets ids, not text, and no end of text ends it.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

SHORT, LONG, BATCHES, SCORED = 32, 1024, (8, 32), (8, 512)


def prompts(batch, length):
    return [[(i * 7919 + b * 104729 + 13) % 50000 + 200 for i in range(length)] for b in range(batch)]


class HuggingFace:
    """transformers, eager."""

    def __init__(self, model, weights, threads):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.torch, self.version = torch, f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        self.load = lambda: transformers.AutoModelForCausalLM.from_pretrained(model / "hf", dtype={"f32": torch.float32, "bf16": torch.bfloat16}[weights]).eval()

    def generate(self, engine, ids, new):
        ids = self.torch.tensor(ids)
        with self.torch.inference_mode():
            made = engine.generate(ids, do_sample=False, min_new_tokens=new, max_new_tokens=new, use_cache=True, pad_token_id=1, attention_mask=self.torch.ones_like(ids))
        return [len(text) - ids.shape[1] for text in made]

    def score(self, engine, ids):
        ids = self.torch.tensor(ids)
        with self.torch.inference_mode():
            logits = engine(ids, use_cache=False).logits[:, :-1].float()
            (logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)).sum().item()


class OnnxRuntime:
    """Through optimum's ORTModelForCausalLM."""

    def __init__(self, model, weights, threads):
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.torch, self.version = torch, onnxruntime.__version__
        self.load = lambda: ORTModelForCausalLM.from_pretrained(model / f"onnx-{weights}", session_options=options, use_io_binding=True)

    def generate(self, engine, ids, new):
        ids = self.torch.tensor(ids)
        made = engine.generate(ids, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=1, attention_mask=self.torch.ones_like(ids))
        return [len(text) - ids.shape[1] for text in made]

    def score(self, engine, ids):
        ids = self.torch.tensor(ids)
        logits = engine(input_ids=ids, attention_mask=self.torch.ones_like(ids)).logits[:, :-1]
        (logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)).sum().item()


class CTranslate2:
    def __init__(self, model, weights, threads):
        import ctranslate2

        self.version = ctranslate2.__version__
        folder = model / f"ct2-{weights}"
        words = json.loads((folder / "vocabulary.json").read_text())
        self.texts = lambda ids: [[words[i] for i in text] for text in ids]
        self.load = lambda: ctranslate2.Generator(str(folder), device="cpu", compute_type={"f32": "float32", "int8": "int8"}[weights], inter_threads=1, intra_threads=threads)

    def generate(self, engine, ids, new):
        made = engine.generate_batch(self.texts(ids), max_length=new, min_length=new, sampling_topk=1, beam_size=1, include_prompt_in_result=False, max_batch_size=0, end_token=[])
        return [len(text.sequences_ids[0]) for text in made]

    def score(self, engine, ids):
        engine.score_batch(self.texts(ids), max_batch_size=0)


class OpenVino:
    """OpenVINO GenAI. Products in bf16 where the processor has that, else in f32, which is then its fastest; scores through the
    model itself."""

    def __init__(self, model, weights, threads):
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai, self.version = numpy, openvino, openvino_genai, openvino_genai.__version__.split("-")[0]
        precision = "bf16" if {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()) else "f32"
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        folder = str(model / f"ov-{weights}")
        self.load = lambda: openvino_genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA", **hints)
        self.compile = lambda: openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", hints).create_infer_request()
        self.request = None

    def generate(self, engine, ids, new):
        ids = self.numpy.array(ids, dtype=self.numpy.int64)
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        tensor = self.openvino.Tensor
        made = engine.generate(self.genai.TokenizedInputs(tensor(ids), tensor(self.numpy.ones_like(ids))), config)
        return [len(text) for text in made.tokens]

    def score(self, engine, ids):
        self.request = self.request or self.compile()
        numpy, ids = self.numpy, self.numpy.array(ids, dtype=self.numpy.int64)
        self.request.reset_state()
        feed = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "beam_idx": numpy.arange(len(ids), dtype=numpy.int32), "position_ids": numpy.tile(numpy.arange(ids.shape[1]), (len(ids), 1))}
        names = {name for port in self.request.model_inputs for name in port.get_names()}
        self.request.infer({name: value for name, value in feed.items() if name in names})
        for text, logits in zip(ids, self.request.get_output_tensor(0).data):
            most = logits[:-1].max(-1, keepdims=True)
            (logits[numpy.arange(len(text) - 1), text[1:]] - numpy.log(numpy.exp(logits[:-1] - most).sum(-1)) - most[:, 0]).sum()


class Vllm:
    """vLLM's build for processors."""

    def __init__(self, model, weights, threads):
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        }.items():  # fmt: skip
            os.environ.setdefault(name, value)
        import vllm

        self.vllm, self.version = vllm, vllm.__version__
        options = {"max_model_len": 2048, "skip_tokenizer_init": True, "enable_prefix_caching": False, "max_num_seqs": 32, "disable_log_stats": True}
        self.load = lambda: vllm.LLM(str(model / "hf"), dtype={"f32": "float32", "bf16": "bfloat16"}[weights], **options)

    def run(self, engine, ids, **wanted):
        wanted = self.vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **wanted)
        return engine.generate([{"prompt_token_ids": text} for text in ids], wanted, use_tqdm=False)

    def generate(self, engine, ids, new):
        return [len(text.outputs[0].token_ids) for text in self.run(engine, ids, max_tokens=new)]

    def score(self, engine, ids):
        self.run(engine, ids, max_tokens=1, prompt_logprobs=0)


PEERS = {"openvino": OpenVino, "ctranslate2": CTranslate2, "onnxruntime": OnnxRuntime, "hugging-face": HuggingFace, "vllm": Vllm}


def peak_memory():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def turn(peer, runs, new):
    start = time.perf_counter()
    engine = peer.load()
    found = {"version": peer.version, "load": time.perf_counter() - start}

    def timed(work):
        seconds = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        # The first warms up.
        return statistics.median(seconds[1:])

    def generate(batch, length, count):
        def work():
            made = peer.generate(engine, prompts(batch, length), count)
            if any(tokens != count for tokens in made):
                raise SystemExit(f"{made} tokens were made, not {count} each")

        return timed(work)

    first = generate(1, SHORT, 1)
    found["decode"] = (new - 1) / (generate(1, SHORT, new) - first)
    for batch in BATCHES:
        found[f"batch of {batch}"] = batch * new / generate(batch, SHORT, new)
    found[f"prompt of {LONG}"] = LONG / generate(1, LONG, 1)
    found["memory"] = peak_memory()
    found["score"] = SCORED[0] * SCORED[1] / timed(lambda: peer.score(engine, prompts(*SCORED)))
    return found


if __name__ == "__main__":
    name, model, weights, threads, runs, new = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    print(json.dumps(turn(PEERS[name](Path(model), weights, int(threads)), int(runs), int(new))))
