"""llama.cpp by the package xllamacpp: sampling, as decoding.py has it for minilm and transformers.

The package has no call that computes logits. It has the object of llama.cpp's server, whose completions are asked for
here by a call, without HTTP. A request has token ids in, and text and log-probs out.
"""

import math

import numpy as np

CANDIDATES = 50         # of a position, whose log-probs are asked for: minilm's most likely token is among them
F32 = 0                 # ggml's number of the type


def as_float32(source, target):
    """Write the GGUF file `source` again, with all tensors in float32."""
    import gguf
    reader = gguf.GGUFReader(source)
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind, *rest = field.types
            writer.add_key_value(name, field.contents(), kind, rest[-1] if kind == kinds.ARRAY else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def server(file, B, tokens, threads, float32):
    """llama.cpp's server with a cache for B texts of so many tokens.

    float32: the cache is float32, and flash attention, which rounds it to float16, is off.
    """
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_parallel = B
    params.n_ctx = B * 256 * math.ceil((tokens + 1) / 256)
    params.n_gpu_layers = 0
    params.cache_ram_mib = 0            # no earlier request is kept
    params.verbosity = 1                # errors
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads
    if float32:
        params.cache_type_k = params.cache_type_v = F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def by_llama_cpp(file, prompts, new, drawn, threads, float32, letter):
    """(step, check) of decoding.py, for the GGUF file `file`. letter: a token that is a letter."""
    B, T = prompts.shape
    prompts = prompts.tolist()
    served = server(file, B, T + new, threads, float32)

    def ask(prompts, new, **options):
        answer = served.handle_completions({
            "prompt": prompts, "n_predict": new, "ignore_eos": True, "cache_prompt": False, **options})
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        return answer

    def step():
        return ask(prompts, new, temperature=1.0, samplers=["temperature"])

    def log_prob(text, token):
        """Of a token after the others, -inf if it is not likely.

        The answer is the letter, because an incomplete character would have no log-probs: they are taken before the
        bias is added.
        """
        answer = ask(text, 1, temperature=0.0, n_probs=CANDIDATES, logit_bias=[[letter, 1e4]], cache_prompt=True)
        likely = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {candidate["id"]: candidate["logprob"] for candidate in likely}.get(token, -np.inf)

    def check():
        responses = np.load(drawn).tolist()
        answer = step()
        full = [choice["finish_reason"] for choice in answer["choices"]].count("length")
        return {"log_probs": np.array([[log_prob(prompt + response[:t], token) for t, token in enumerate(response)]
                                       for prompt, response in zip(prompts, responses)]),
                "shape": np.array([full, answer["usage"]["completion_tokens"]])}
    return step, check
