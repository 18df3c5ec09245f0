"""Which tests are tried first for a bug that mutants.py plants, and which last: a table by hand."""

# {module: tests of another name that find its bugs}; they run after the tests with its name.
ALSO = {"tensor": ("test_ops",), "backend": ("test_ops", "test_tensor"), "numpy_functions": ("test_tensor",),
        "data": ("test_evaluate",), "config": ("test_model", "test_pretrained"),
        "model": ("test_plain", "test_generate", "test_packing", "test_pretrained"), "tokenizer": ("test_fuzz",),
        "packing": ("test_model",), "padded_attention": ("test_model", "test_plain"),
        "generate": ("test_stages", "test_device"), "evaluate": ("test_stages",),
        "gradients": ("test_exact_gradients",), "step": ("test_stages", "test_late", "test_ranks"),
        "measuring": ("test_gpu_process", "test_benchmarks"),
        "readback": ("test_late",), "in_place": ("test_tensor", "test_optim"),
        "mixed_precision": ("test_mixed_decoding", "test_tf32"), "cublas": ("test_gemm",),
        "modes": ("test_tensor",), "chunked_log_probs": ("test_layers",),
        "tiled_attention": ("test_layers", "test_packing"), "rotary": ("test_layers", "test_plain"),
        "packed_attention": ("test_packing", "test_model"), "few_rows": ("test_generate",),
        "cached_decoding": ("test_generate", "test_plain", "test_mixed_decoding", "test_tf32"),
        "gguf_file": ("test_pretrained",),
        "flat_parameters": ("test_optim", "test_ranks", "test_stages"), "deferred": ("test_tensor", "test_layers"),
        "activation_checkpointing": ("test_tensor", "test_model"), "forked": ("test_ranks",),
        "ranks": ("test_mpi",), "heartbeat": ("test_mpi",), "workers": ("test_platforms",),
        "optim": ("test_ranks",), "agreement": ("test_ranks",), "launch": ("test_launch_limits",),
        "smear": ("test_smear_kernel",),
        **dict.fromkeys(("mixed_layers", "lora"), ("test_mixed_lora", "test_mixed_precision")),
        "train_state": ("test_late", "test_ranks", "test_platforms", "test_agreement", "test_inputs"),
        "dpo": ("test_inputs",), "rlhf": ("test_ranks", "test_inputs"), "command_line": ("test_commands",),
        **dict.fromkeys(("tensor_cores", "copies", "memory", "product", "bf16"),
                        ("test_tensor_core_checkers", "test_tensor_cores")),
        "stream": ("test_late", "test_chat"), "encoding": ("test_training_data",),
        **dict.fromkeys(("grading", "outcome", "recognise", "task", "differences"), ("test_exercises",)),
        **dict.fromkeys(("process", "catalogue", "cuda", "__main__"), ("test_exercises_command",)),
        "reference": ("test_exercises", "test_exercises_command"),
        "predict": ("test_predictions",)}
# Tests of many modules. They run first where the likely ones pass.
WIDE = ("test_arguments", "test_tensor", "test_layers", "test_inputs", "test_lecture", "test_stages", "test_fuzz")
# The slowest tests run last: of ranks under mpiexec, of kernels, of the assistant, of benchmarks.
LATE = ("test_mpi", "test_nccl", "test_network", "test_device", "kernel", "emulator", "tensor_core", "test_cupy_double",
        "test_exact_optimum", "test_assistant", "test_bench")
