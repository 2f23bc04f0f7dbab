"""DeepSeek's language models as a book that runs

Packages:

- `deepseek_nb.quant`: Weights stored as small integer codes and scales. A layer uses a quantised weight in place of a parameter.
- `deepseek_nb.kernels`: Every operation has a readable definition and faster twins. `kernels.use` selects the kind of twin that runs, and `kernels.twins` lists all twins.
- `deepseek_nb.bench`: Time two implementations alternately, measure peak memory and the highest rates of a machine, plot a roofline, and store results as files.
- `deepseek_nb.exercises`: Write a function yourself, and `check` compares it with the library on fresh random inputs and says what is wrong
- `deepseek_nb.studies`: An experiment has a plan that is written before it runs, and a stored record of each run. This chapter reads plans, runs and resumes experiments, checks and summarises their records, and imports studies from their notebooks.

Modules:

- `deepseek_nb.apps.anomaly`: Learns from a signal, scores one observation at a time, saves its state, sets its threshold from a budget of false alarms, and explains its alarms
- `deepseek_nb.apps.command`: Each application can be trained, score a file, be served over HTTP with keys, and show its model card. One reader, one writer and one command do it for all
- `deepseek_nb.apps.control`: One interface to three ways of giving a model's text a style, with a strength, and measures of what it costs: style from 1 to 5, content kept, and fluency
- `deepseek_nb.apps.crosslingual`: A frozen multilingual encoder, a linear head that learns in English alone, and maps that align other languages by a hundred parallel paragraphs
- `deepseek_nb.apps.filter`: Patterns, planted secrets, names and toxic words behind one policy: for the server, for a table of texts, and for the command line
- `deepseek_nb.apps.inspect`: Gives the cause of a defect from a picture, a recording or both, with a heat map, reports pieces that are unlike all known ones, and reads PNG and WAV files
- `deepseek_nb.apps.langadapters`: MAD-X: small adapters for a language, with an invertible part at the embedding, and for a task; trained separately, stacked, and exchanged for another language
- `deepseek_nb.apps.route`: Takes orders, returns feasible routes before a deadline, replans when an order arrives or is cancelled, and doesn't change the stops that vehicles have already reached
- `deepseek_nb.apps.route_moves`: Moves that shorten routes, disturbances that leave a local minimum, and savings, in Python and, some hundreds of times faster with equal routes, in C++. Feasible routes stay feasible
- `deepseek_nb.apps.series`: Loaders for five public sets of anomalies, fraud and money laundering, with splits that keep the future and other cards, files and graphs out of training
- `deepseek_nb.apps.steer`: Two ways to give a model a style at any strength: add a vector to the residual stream, for each row of a batch its own, or train a LoRA adapter and scale it
- `deepseek_nb.apps.tcn`: A small causal network for signals: dilated convolutions see the recent past, attention heads look back whole periods, and each head chooses the length of its window
- `deepseek_nb.apps.wafers`: Loaders for two sets of wafer maps and one of bearings, with repeats removed, and a rule that pairs pictures with vibration so that both are needed
- `deepseek_nb.apps.watch`: The anomaly detector as an application: rows in, scores and alarms out, with small weights that were trained on simulated card payments
- `deepseek_nb.arch.attention`: Grouped-query attention (GQA), and DeepSeek's multi-head latent attention (MLA) in two forms that give the same result at different costs
- `deepseek_nb.arch.cache`: The keys and values of earlier tokens, or one latent per token for MLA, are stored for later decode steps
- `deepseek_nb.arch.compressed`: DeepSeek-V4 pools every 4 or every 128 tokens into one entry. A query attends to its window and to entries: to the best 512 of the fine ones, or to all of the coarse ones
- `deepseek_nb.arch.dspark`: DeepSeek-V4's own drafter: three small blocks read the model's activations and draft five tokens in one pass. A table of token pairs makes neighbouring tokens consistent.
- `deepseek_nb.arch.engram`: The last few tokens are hashed to rows of large tables, and a gate adds these rows to the residual stream. The model gains parameters that cost almost no FLOPs
- `deepseek_nb.arch.hash`: In V4's first blocks a table maps each token id to its experts, so the router decides nothing. In all blocks, both halves of a SwiGLU are clamped
- `deepseek_nb.arch.hyper`: V4 carries four residual streams through the model. Each block mixes them by a doubly stochastic matrix, so that their norm can't grow with depth
- `deepseek_nb.arch.model`: A block adds attention and a feed-forward network to the residual stream. A model is an embedding, a list of blocks, a norm and a head. With V3's config, it is DeepSeek-V3
- `deepseek_nb.arch.moe`: The feed-forward network of a block: one SwiGLU in a dense block; in all other blocks a router, the experts that it selects for each token, and shared experts
- `deepseek_nb.arch.mtp`: An additional block predicts the token after the next one. It gives a second training loss, and drafts for speculative decoding
- `deepseek_nb.arch.norm`: RMSNorm divides each row by its root mean square and scales each channel. It normalises the input of every attention layer and feed-forward network
- `deepseek_nb.arch.releases`: Parameters, active parameters, FLOPs and KV cache bytes per token of every DeepSeek release, computed from its config
- `deepseek_nb.arch.rewindable`: V4's KV cache keeps window keys in a ring, entries, and the raw rows of unfinished windows, so that a rewind is exact; V3.2's may keep its index keys as 8-bit codes
- `deepseek_nb.arch.rope`: RoPE rotates queries and keys by their positions, so that attention scores depend only on distances; YaRN and Llama 3's rule extend it to longer contexts
- `deepseek_nb.arch.routing`: The router of a mixture of experts selects a few experts for each token. A bias or a loss balances the load, and no token is dropped
- `deepseek_nb.arch.show`: Diagrams of a model's architecture and of the data flow of MLA, drawn from its config, and tables of a config, a model, a cache and a routing result, which notebooks display
- `deepseek_nb.arch.sparse`: V3.2's lightning indexer scores all earlier tokens at a small cost, and each query attends only to the 2,048 tokens with the highest scores
- `deepseek_nb.arch.v3`: The whole model on a few screens: config, norm, rotary positions, latent attention, router, experts, blocks, cache and generation, equal to the library's model
- `deepseek_nb.arch.v4`: DeepSeek-V4 is the transformer with other parts: several residual streams, attention to a window and to compressed entries, and experts that a table of token ids chooses
- `deepseek_nb.arch.v41`: V4.1 stores 890 bytes of cache for each token: only four layers compress tokens to entries, the others borrow entries and selections, and a prompt runs through half of the layers
- `deepseek_nb.arch.window`: DeepSeek-V4's attention: one head of keys that are also the values, a window of 128 tokens, a sink for each query head, and a grouped output projection
- `deepseek_nb.bench.caches`: The time that a KV cache saves, the time to the first token with a prefix cache, and the speed and error of paged and quantised caches.
- `deepseek_nb.bench.gpu`: `make gpu` compiles, checks and measures all CUDA kernels on the GPU of a machine, and stores the results under its name. Without a GPU, emulation and compilers check what they can.
- `deepseek_nb.bench.limits`: FLOPs and bytes of a layer, a prompt, a decode step and a training step, counted from the config, and the shortest time in which a machine can do this work.
- `deepseek_nb.bench.models`: Times of prefill, decoding, training steps and compiled decoding of whole models, compared with transformers and with the limits of the machine.
- `deepseek_nb.bench.plan`: Memory, all-to-all, pipeline bubble, tokens per second and price of serving and training V3 and V4 on any number of cards, beside the figures that DeepSeek published.
- `deepseek_nb.bench.quant`: Speed, size, peak memory, perplexity and error of models in 8 and 4 bits, compared with the same models in float32.
- `deepseek_nb.bench.runtimes`: The same model, prompts and number of threads in llama.cpp, OpenVINO GenAI, ONNX Runtime GenAI and transformers: prefill, decoding of one and of eight rows, and loading.
- `deepseek_nb.bench.serve`: Our server, transformers serve, llama.cpp and vLLM with the same model and the same load: throughput, inter-token latency and time to first token at 1 to 32 streams, and goodput.
- `deepseek_nb.bench.speculate`: The cost and the gain of drafts: step times of a dense model and of a mixture, prompt lookup on quotations, edits and chat, and measured against predicted speedups of draft models.
- `deepseek_nb.bench.training`: Time and memory of a LoRA training step compared with PEFT, and the memory of QLoRA compared with full fine-tuning.
- `deepseek_nb.core.config`: A frozen dataclass with all sizes and design choices of a model: forty numbers, from which everything else follows
- `deepseek_nb.core.config_json`: Reads the `config.json` of a model into a `Config` and writes it back, in the form of DeepSeek's releases or in that of transformers
- `deepseek_nb.core.device`: How the device of tensors, the dtype of weights and the number of threads are chosen, and how weights get memory with large pages, which a processor reads faster
- `deepseek_nb.core.dispatch`: Each operation has a readable definition and faster implementations with the same signature, its twins. A registry selects the fastest one for each call
- `deepseek_nb.core.lazy`: A class has all its methods, and an operation all its kernels, whichever chapter was imported: the chapter that defines a method or kernel is imported on first use
- `deepseek_nb.core.nbproc`: Notebook cells that start with `%%cpp` or `%%cu` are compiled when they run, and exported as source files; methods that are shown one by one are exported into their class
- `deepseek_nb.core.plot`: Plots that are legible on light and dark pages, in colours that colour-blind readers can distinguish
- `deepseek_nb.core.reading`: The conventions of all chapters, each with a small example that runs: documented parameters, names of axes, methods that later chapters add, operations with several implementations, and C++ cells
- `deepseek_nb.core.tiny`: Write a small transformer, train it before your eyes in less than a minute, and read what it writes before, between and after
- `deepseek_nb.cuda.attention`: Attention over MLA's latent KV cache on tensor cores. The cache is split over multiprocessors and may be ragged or paged.
- `deepseek_nb.cuda.build`: Compiles a `.cu` file at its first launch, for the GPU with NVRTC or nvcc, or for the CPU with a C++ compiler and the emulation.
- `deepseek_nb.cuda.device`: Number formats, tensor-core instructions and asynchronous copies, as PTX for the GPU and as plain C++ for the CPU, and how Python passes arguments to a kernel.
- `deepseek_nb.cuda.emulation`: A C++ header that runs the threads of a CUDA block as fibers on the CPU, so that kernels can be tested without a GPU and in several thread orders.
- `deepseek_nb.cuda.experts`: Computes the routed experts of a layer in CUDA C++: one launch for all experts, SwiGLU in the first product, and no copy of the tokens.
- `deepseek_nb.cuda.fp8`: DeepSeek-V3's FP8 matrix product on a GPU, with a scale for each 128 activations and each 128×128 block of weights, and float32 sums every 128 columns.
- `deepseek_nb.cuda.norm`: Normalises and rotates MLA's latent in a single kernel, which reads and writes it once, and applies RoPE to queries.
- `deepseek_nb.cuda.paged`: Runs a ragged batch on a GPU: attention reads keys, values or latents directly from their pages, and a row's result doesn't depend on the other rows.
- `deepseek_nb.cuda.quant`: Linear layers and experts with int4 and int8 weights on a GPU: integer products of rounded activations, and weights that are decoded to bfloat16 in registers.
- `deepseek_nb.cuda.route`: CUDA kernels of a mixture of experts: expert selection with one warp per token, a counting sort of tokens by expert, and the weighted sum of the experts' outputs.
- `deepseek_nb.cuda.sparse`: DeepSeek sparse attention on a GPU: index scores on tensor cores, an exact radix selection, and flash-decoding over a list of positions.
- `deepseek_nb.cuda.tiles`: A matrix product in tiles, with asynchronous copies in a pipeline, a shared-memory layout without bank conflicts, and `mma.sync` or `wgmma`.
- `deepseek_nb.eval.behaviour`: Small tests of one ability each, in CheckList's three kinds: a known answer, an answer that must not change, and a confidence that may only move one way
- `deepseek_nb.eval.bias`: CrowS-Pairs and StereoSet: whether a model finds the stereotyped one of two sentences likelier, by type of bias, with intervals and the known criticism.
- `deepseek_nb.eval.choice`: Score each answer of a question by its log-likelihood and measure how often the right answer has the highest score, as lm-evaluation-harness does.
- `deepseek_nb.eval.classify`: Compute accuracy, macro-F1 and micro-F1 from a confusion matrix, bootstrap confidence intervals, and the calibration error of a model's probabilities.
- `deepseek_nb.eval.drift`: Tests that tell whether this week's requests are those that a model was checked on, and whether too many fail or are slow, with a rate of false alarms that is known before the first week
- `deepseek_nb.eval.intervals`: How sure a score is, and which differences between two models count: bootstrap and Wilson intervals, McNemar's test, and Holm's rule for many comparisons.
- `deepseek_nb.eval.perplexity`: Measure how well a model predicts a text that is longer than its context, and what each quantisation format costs in perplexity and saves in bytes and time.
- `deepseek_nb.eval.report`: Run all evaluation tasks on a model, keep every item's value in one JSON file, write a page for readers, and say which differences between two models count
- `deepseek_nb.export.command`: One function and one command, `deepseek-nb export`, for all formats in which models leave this package.
- `deepseek_nb.export.figures`: Runs a small model in the reader's browser: its experts, attention, KV cache and next tokens for any text, without a server; and measures how long the reader waits
- `deepseek_nb.export.gguf`: A checkpoint becomes one GGUF file that llama.cpp loads: metadata, tokenizer and chat template, and every tensor in floats or quantised blocks.
- `deepseek_nb.export.onnx`: A model becomes an ONNX graph with dynamic batch and length, in floats or with matrices of 8 or 4 bits, which ONNX Runtime, OpenVINO and TensorRT execute without Python.
- `deepseek_nb.export.runner`: An engine in C++ that computes a model from one GGUF file: its C interface, its threads, and how Python compiles and calls it.
- `deepseek_nb.export.runner_binary`: A program of 2 MB without dependencies that continues a text or chats: its command line, the choice of a token, one engine for each instruction set, and a model inside it.
- `deepseek_nb.export.runner_file`: What a GGUF file is to a program: mapped bytes, a header, and tensors in blocks, which are decoded, packed and multiplied where they lie. Its tokens and merges make a byte-level BPE tokenizer.
- `deepseek_nb.export.runner_step`: Latent and grouped-query attention, router and experts, from tokens to logits, compared with the model in Python after each stage.
- `deepseek_nb.export.tensorrt`: A TensorRT engine from the ONNX file: strongly typed, without plugins, with profiles for prefill and decode, and a benchmark for a machine with a GPU.
- `deepseek_nb.export.transformers`: A model of this package as a `PreTrainedModel` of transformers, with its own kernels, quantised weights and KV cache: beams, streamers, `pipeline`, and the trainers of PEFT and TRL
- `deepseek_nb.export.wasm`: Compiles the C++ engine to a small WebAssembly module for browsers, and records the sources that it was made from
- `deepseek_nb.files.chat`: Converting a conversation to a prompt by the checkpoint's chat template, with the same result as transformers. Control tokens in messages are treated as plain text.
- `deepseek_nb.files.checkpoint`: Loading a folder of safetensors into a model, with DeepSeek's FP8 weights, and saving a model in a form that transformers loads. A key that doesn't match is an error.
- `deepseek_nb.files.gguf`: llama.cpp's file format, which contains metadata, tokenizer and quantised weights in one file, and how it is read into a config and a model.
- `deepseek_nb.files.hub`: Finding a model's files by a path, a Hugging Face id or a registered name. Downloads are verified and cached.
- `deepseek_nb.files.safetensors`: Reading and writing safetensors files of any size: tensors are read one at a time with little memory, and files are written atomically.
- `deepseek_nb.files.tokenizer`: Converting text to token ids and back, with the vocabulary of a `tokenizer.json` or a GGUF file. Control tokens in a user's text are treated as plain text.
- `deepseek_nb.files.untrusted`: Read JSON lines, CSV and Parquet that strangers upload, one row at a time in bounded memory; every hostile or broken file causes one clear error message.
- `deepseek_nb.infer.conversation`: A conversation keeps its messages and its KV cache, so each turn computes only its new tokens. Prefill and decode rates are measured separately.
- `deepseek_nb.infer.drafts`: Guesses of the next tokens: from an earlier passage of the text, a smaller model, a multi-token-prediction block, or V4's block drafter.
- `deepseek_nb.infer.engine`: One thread owns the model and runs all requests together, step by step. On a CPU, each answer is the same as if the request had run alone.
- `deepseek_nb.infer.generate`: Turns the logits of a model into tokens and text: greedy or sampled, for one prompt or a padded batch, complete or streamed, with stop strings.
- `deepseek_nb.infer.inside`: Shows the residual stream, attention patterns, the logit lens and the expert load of a model for a given text.
- `deepseek_nb.infer.load`: `Model.from_pretrained` finds a checkpoint and loads it. GGUF files and quantised folders keep their quantised weights; other checkpoints are loaded as floats. The argument `dtype` selects another format.
- `deepseek_nb.infer.paged`: Stores the KV cache of all sequences in fixed-size pages of one pool, as in vLLM. Memory is bounded, little of it is wasted, and sequences share the pages of a common prefix.
- `deepseek_nb.infer.persist`: Stores pages of the KV cache as files, so that a cached prompt survives a restart. Each file is named by a hash of everything that its content depends on, and checked when it is read.
- `deepseek_nb.infer.prefix`: Requests share the KV cache of common prefixes, so a prompt is computed only from the first page in which it differs from earlier ones. Hits and misses are counted as in DeepSeek's API.
- `deepseek_nb.infer.quant_cache`: Stores the latents, keys and values of the KV cache in 8 bits. This takes less than half of the memory of a float32 cache.
- `deepseek_nb.infer.ragged`: One forward pass for sequences of different lengths, each with a LoRA adapter of its own if it has one: some process a chunk of a prompt, others one new token, and each gets the same result as alone.
- `deepseek_nb.infer.request`: A request says what to generate and when to stop. Its stream carries the tokens from the engine's thread to the caller that waits for them. A fair queue and the plan of a step decide which requests run.
- `deepseek_nb.infer.sampling`: Logits become a token: greedy or drawn, with temperature, top-k, top-p, min-p, penalties and grammars. Each row of a batch draws for itself, so its tokens never depend on the other rows.
- `deepseek_nb.infer.scores`: What a model says about texts without writing one: how likely a continuation is, which class a text has, and a vector for each text
- `deepseek_nb.infer.speculate`: The model verifies a draft of several tokens in one step. The distribution of the text doesn't change, and where drafts are often right it takes fewer steps.
- `deepseek_nb.infer.stores`: Two kinds of KV cache behind one interface: pages that requests share, and caches that requests own. The engine's scheduling is the same for both.
- `deepseek_nb.kernels.adapted`: Runs rows with different LoRA adapters in one C++ call, on float or quantised weights; each row gets the same bits as alone.
- `deepseek_nb.kernels.attention`: FlashAttention and flash-decoding for GQA and MLA, for prompts and decode steps, contiguous or in pages: the keys are divided among the threads.
- `deepseek_nb.kernels.build`: Compile a C++ kernel for the processor of this machine, store the library in a cache, and load it as PyTorch operators.
- `deepseek_nb.kernels.codes`: Multiplies int8 or int4 weights by activations that are rounded to int8, with the processor's byte instructions.
- `deepseek_nb.kernels.compile`: `model.compile()` compiles the decode step to a single graph, which is traced once for all cache lengths.
- `deepseek_nb.kernels.flash`: Attention over blocks of keys with an online softmax: each query keeps a running maximum and a running sum, so the matrix of scores is never stored.
- `deepseek_nb.kernels.gemm`: The matrix product that all CPU kernels use: dot products along the rows of the weights for few tokens, and register tiles for many tokens.
- `deepseek_nb.kernels.gradients`: SwiGLU, RMSNorm and causal attention with their gradients, each in one pass over memory, for training with frozen weights.
- `deepseek_nb.kernels.invariant`: Matrix products in which the result of a token has the same bits, whichever other tokens are multiplied in the same call.
- `deepseek_nb.kernels.moe`: Routing and dropless experts in C++: tokens are sorted by expert and read in place, and the weighted results are added to the output in place.
- `deepseek_nb.kernels.norm`: RMSNorm and RoPE are memory-bound, so the C++ kernels compute them in one pass that reads and writes each number once.
- `deepseek_nb.kernels.panels`: Stores the rows of an int8 or int4 weight in panels of sixteen rows, interleaved in the order in which the processor's integer instructions read them.
- `deepseek_nb.kernels.plan`: Describes the weights of a model in one table, and runs all blocks in one C++ call, for each kind of matrix, attention and cache.
- `deepseek_nb.kernels.ragged`: Rows of different lengths for the stages in C++: where their tokens are written and read in pages of floats or of 8-bit codes, and calls of bounded size.
- `deepseek_nb.kernels.simd`: What all kernels on a CPU share: a vector type for AVX-512, AVX2, NEON and others, and threads that are started once and wait at barriers between stages.
- `deepseek_nb.kernels.sparse`: DeepSeek sparse attention in C++: index scores, in floats or in codes of 8 bits, exact selection in linear time, and attention that reads only the selected latents.
- `deepseek_nb.kernels.stages`: Computes the attention and the feed-forward of a transformer block in C++, as stages of one team of threads with barriers between them.
- `deepseek_nb.kernels.train`: Gradients of routed experts, causal attention and RMSNorm in PyTorch, written by hand so that they move fewer bytes than autograd's.
- `deepseek_nb.kernels.v4`: Runs all blocks of DeepSeek-V4 in one C++ call per token, on the cache that can be rewound.
- `deepseek_nb.kernels.v4_stages`: Computes one block of DeepSeek-V4 in C++, as stages of one team of threads with barriers between them.
- `deepseek_nb.platform.access`: Who may do what: passwords that are slow to guess, sessions of browsers, tokens of programs, and roles, with no password that anybody knows beforehand.
- `deepseek_nb.platform.app`: Pages, the chat API and the release that each owner gets, in one process: tokens are its keys, and every answer becomes an event
- `deepseek_nb.platform.audit`: Who did what and when, written in the same transaction as the change itself; an entry that is later edited, deleted, inserted, moved or cut off is found.
- `deepseek_nb.platform.data_pages`: Import, look through and export datasets in a browser, and label them with the keyboard alone; every page works without scripts too.
- `deepseek_nb.platform.datasets`: Import rows, name each version by its content, give every record a split that it keeps, and report near-duplicates, leaks and personal data.
- `deepseek_nb.platform.entry`: The pages through which people enter the platform: the first set-up with a code from the console, log-in, users and roles, API tokens, settings
- `deepseek_nb.platform.events`: Every request becomes an event and a part of its minute: a thread writes both in batches, without loss and without making the server wait
- `deepseek_nb.platform.exchange`: Write tasks, answers and predictions in the JSON of Label Studio and of Argilla, read them from there, and export tables without formulas.
- `deepseek_nb.platform.forms`: Texts, numbers and files out of the body of a request, with limits that are counted while the bytes arrive, and errors that name the field
- `deepseek_nb.platform.jobs`: Training runs wait in a queue, each runs in its own process, and a job whose process was killed continues from its last checkpoint
- `deepseek_nb.platform.labels`: Hand out records, the most uncertain first, never one to two people by accident; keep answers, undo and skip; measure agreement, settle disputes.
- `deepseek_nb.platform.layout`: How a page of the platform is written: elements, forms that other sites can't send, a table of routes with roles, and the frame that checks each request
- `deepseek_nb.platform.monitor`: Rules, drift, probes and feedback: what a monitor does once a minute, and how it tells people
- `deepseek_nb.platform.operator`: Which internal hosts may be reached, where runs and numbers are copied, and what tokens cost: files in the folder of the platform, read when it starts
- `deepseek_nb.platform.registry`: Each model is stored with where it came from and what was measured, its card is written from that alone, and limits in a file decide about release
- `deepseek_nb.platform.rollout`: A model that passes its gates is released to a place, at first for a share of the owners or in the shadow of the old one, and one call goes back
- `deepseek_nb.platform.run_pages`: See a run learn, cancel it, read a model's card, and release a model or go back, each with one button and without writing a command
- `deepseek_nb.platform.runs`: Fine-tuning, LoRA, QLoRA, distillation, quantising, conversion and evaluation as jobs that read a dataset version and register a model
- `deepseek_nb.platform.start`: One command, one folder, one port: the database, a first task, the worker of jobs, the monitor and the server, until SIGTERM ends all of them in order
- `deepseek_nb.platform.store`: SQLite on a laptop, Postgres for a team, through one SQL layer: what is committed stays, readers see one snapshot, and large files lie beside the tables.
- `deepseek_nb.platform.style`: One stylesheet, one small script and charts as SVG for all pages of the platform: light and dark, wide and narrow, by keyboard, and nothing from another host
- `deepseek_nb.platform.watch_pages`: Requests, latency, errors and cost of the last day, drift by week, alerts and what became of them, and what users say
- `deepseek_nb.quant.fp8`: The format of DeepSeek-V3's checkpoint: E4M3 codes with one scale for each block of 128×128. Layers use the published weights without conversion.
- `deepseek_nb.quant.ggml`: The block formats Q8_0, Q4_0, Q4_1, Q4_K and Q6_K of GGUF files as quantised weights: a model computes with the file's codes, without a float32 copy.
- `deepseek_nb.quant.gptq`: Rounding to four bits with calibration data: each weight's rounding error is compensated by the weights that are rounded after it.
- `deepseek_nb.quant.groups`: int8-fine: 8-bit weights with a scale and a minimum, and two 8-bit codes for each activation; FP4, the format of DeepSeek-V4's experts (MXFP4), with a power of two as the scale.
- `deepseek_nb.quant.int4`: Weights in 4 bits: each is rounded to one of sixteen evenly spaced levels, and 32 neighbouring weights share a scale, or a scale and a minimum.
- `deepseek_nb.quant.int8`: Weights and activations in 8 bits (W8A8), with one scale for each output channel or group of weights: a quarter of float32's memory, with a small error.
- `deepseek_nb.quant.model`: Quantise a model in memory or while it is loaded, choose the format of each parameter, and keep the quantised blocks of GGUF files.
- `deepseek_nb.quant.nf4`: 4-bit weights with sixteen levels at the quantiles of a normal distribution, and scales that are themselves quantised to 8 bits.
- `deepseek_nb.quant.save`: Saving a quantised model as a folder of safetensors files, mapping the files into memory, and rewriting a checkpoint in the formats that vLLM, SGLang and transformers load.
- `deepseek_nb.serve.anthropic`: Anthropic's protocol for the same models: content in blocks, thinking with a budget, tool use, named events, and counting of tokens
- `deepseek_nb.serve.app`: An HTTP server for the chat API: keys, limits, streams that notice when a client leaves, metrics, and an orderly end
- `deepseek_nb.serve.chat`: What all chat protocols share: a request is read field by field, messages become a prompt, and an answer becomes events.
- `deepseek_nb.serve.completions`: OpenAI's chat API with DeepSeek's additions: reasoning, prefix completion and cache accounting, whole or as a stream of chunks
- `deepseek_nb.serve.connection`: A server must not be delayed by slow clients, and must stop generating as soon as the client has left
- `deepseek_nb.serve.events`: The text of an answer is split into reasoning, content and tool calls as it arrives, and the result doesn't depend on where the stream was cut.
- `deepseek_nb.serve.grammar`: A grammar decides before each token which ones may follow, so an answer is valid JSON, matches a schema or a regular expression, or calls a tool correctly.
- `deepseek_nb.serve.guard`: Reasoning, content and the arguments of tool calls are filtered while they stream; arguments stay valid JSON, and a blocked answer ends with valid events
- `deepseek_nb.serve.logs`: One line for each request: who, what, how long and how many tokens, but not what was said; and counters of the engine under the names that vLLM's dashboards know
- `deepseek_nb.serve.lora`: A LoRA adapter answers under a model name of its own, and an administrator loads and unloads adapters over HTTP.
- `deepseek_nb.serve.ollama`: Programs written for Ollama talk to this server too: `/api/chat`, `/api/generate` and the list of models are translations of the chat API.
- `deepseek_nb.serve.openapi`: `GET /openapi.json` describes every route in OpenAPI 3.1, so that tools can write clients, and send what nobody thought of
- `deepseek_nb.serve.page`: One small page at the server's root: chat with a model, watch it think, and see how fast it answers, what was cached and which experts were used
- `deepseek_nb.serve.patterns`: Finds card numbers, IBANs, national numbers, e-mail addresses, telephone numbers, keys and planted secrets in a stream, and tells which text may still become a match
- `deepseek_nb.serve.policy`: A TOML file says what happens to card numbers, names, secrets and insults, and a stream holds back only text that may still become part of a match
- `deepseek_nb.serve.responses`: OpenAI's newer protocol: requests and answers are lists of items, a stream reports how each item grows, and a request can continue from a stored answer
- `deepseek_nb.serve.scores`: What clients ask of a model besides text: a vector for each text, the documents that answer a question, and the class of a text
- `deepseek_nb.serve.text`: The older completions API, without messages: prompts as text or token ids, log-probabilities of the prompt for evaluation harnesses, and filling in the middle
- `deepseek_nb.serve.timeline`: Records what an engine does in each step, and draws it: the schedule, and the pages of a preemption.
- `deepseek_nb.serve.tools`: How DeepSeek-V3 to V4.1 and the Hermes format write tool calls into the text, and parsers that stream the arguments while they are written
- `deepseek_nb.serve.webhooks`: Messages to other systems that are signed, can't be replayed, and never reach into the internal network
- `deepseek_nb.studies.cases`: Patients with rare diseases from case reports: their signs as text, a split in which no publication is on both sides, and a floor that compares signs with the ontology's own descriptions.
- `deepseek_nb.tools.book`: Reads chapters, parts and reading paths from the notebooks, and makes the front page, the README, the sidebar and the map from them, so that they agree.
- `deepseek_nb.tools.cli`: The command `deepseek-nb`, with one short function for each subcommand: chat, generate, quantize, finetune, eval, bench and others.
- `deepseek_nb.tools.doctor`: What this machine offers for running models: device, processor, threads, compilers, kernels, memory and cache folder. If something is missing, the doctor says what it is needed for.
- `deepseek_nb.tools.serving`: Reads settings, loads the models, and serves them over HTTP, or answers a file of requests: exactly one answer a line, however often the run is killed
- `deepseek_nb.tools.site`: Each notebook becomes a page with its code, stored outputs and links. No cell is run, and the pages load nothing from other hosts.
- `deepseek_nb.train.advantage`: The advantage says how much better an answer is than expected. It is computed from a group of answers or from a critic; bias and variance of both are computed exactly on small policies.
- `deepseek_nb.train.balance`: Without load balancing a router sends most tokens to a few experts. V3 corrects this with a bias per expert and a small sequence-wise loss.
- `deepseek_nb.train.bpe`: Learn byte-level BPE merges from text, with DeepSeek-V3's word splitting, and save the tokenizer in Hugging Face's format.
- `deepseek_nb.train.callbacks`: Callbacks run at named events of a training run: they show its progress, plot its loss, and stop it when it diverges.
- `deepseek_nb.train.convert`: Convert a trained model to latent attention, to a mixture of experts, or to single neurons as experts, and repair it. With both latent attention and experts, it is a DeepSeek-V3.
- `deepseek_nb.train.corpora`: Load prose, plays, speeches, dictionary entries, diagnoses and exam questions, checked against pinned hashes; turn chats, pairs and labelled texts into examples in which only the answer counts.
- `deepseek_nb.train.data`: Text is tokenised, packed into rows of one length and read in shuffled batches. A killed run resumes at the exact batch where it stopped.
- `deepseek_nb.train.distill`: A student model learns from a teacher's probabilities for every token of the vocabulary, not only from the one token in the text.
- `deepseek_nb.train.distill_stages`: Run distillation as a list of stages, such as a general and then a domain teacher, or an assistant model in between; a killed run can be resumed.
- `deepseek_nb.train.dynamic`: Activate fewer experts for some tokens or layers to meet a FLOPs budget, by one of four rules, and train a model for a varying number of experts.
- `deepseek_nb.train.grpo`: The whole loop: sample groups of answers, reward them, and improve the policy, with curves, a guard, and an exact resume.
- `deepseek_nb.train.indexer`: Make a trained model with dense latent attention sparse: train V3.2's indexer to predict where the model attends, then train the model with the indexer's selection.
- `deepseek_nb.train.kl_estimate`: Three estimates of the divergence from a reference, from sampled tokens alone. Bias and variance of each as a number and as a loss, and when the term is useful.
- `deepseek_nb.train.lora`: Low-rank adapters fine-tune a frozen model by training a small number of additional parameters. They can be swapped, merged and mixed in a batch.
- `deepseek_nb.train.loss`: Cross-entropy summed over scored tokens, with logits computed in chunks, so that the logits of all positions are never in memory at the same time.
- `deepseek_nb.train.mini`: Pre-train models of about 6 million parameters, with the architectures of DeepSeek-V3 and V4 and an own tokenizer, on public text, and evaluate them on held-out documents.
- `deepseek_nb.train.on_policy`: A student generates text that the teacher scores, with a guard against its collapse; each token of an answer gets its log-probability, with an exact gradient and one pass over a shared prompt.
- `deepseek_nb.train.optim`: AdamW scales each element of the gradient by its running mean square. Muon, the optimiser of DeepSeek-V4, orthogonalises the momentum of whole matrices.
- `deepseek_nb.train.parallel`: Several processes share a training step by data parallelism, fully sharded data parallelism or expert parallelism, and get the same result as one process.
- `deepseek_nb.train.peft`: Save and load LoRA adapters in PEFT's layout; when only adapters are trained, store few activations and multiply by each frozen weight once in the backward pass.
- `deepseek_nb.train.policy`: GRPO's loss, and what later papers changed in it, each as a switch: ratio, clipping, aggregation, corrections for tokens that another policy sampled.
- `deepseek_nb.train.qlora`: LoRA on a quantised model: gradients pass through int8, int4 or NF4 weights without dequantising a whole matrix.
- `deepseek_nb.train.r1`: Cold start, reinforcement learning, rejection sampling, fine-tuning, a second reinforcement, and distillation into a smaller model, from one TOML file
- `deepseek_nb.train.resume`: A training run that was killed at any step resumes from its last checkpoint, and its results are bit-identical to those of an uninterrupted run.
- `deepseek_nb.train.rewards`: Rewards for equal numbers, tags in the right order, the right language and lengths within a limit, each tested with answers that try to cheat it
- `deepseek_nb.train.rollout`: A policy writes groups of answers in the batching engine. Each answer repeats bit for bit from its seed, and the trainer can score it with the sampler's own bits.
- `deepseek_nb.train.runs`: Describe a fine-tuning, a distillation or a conversion in one TOML file, and resume an interrupted run by calling it again.
- `deepseek_nb.train.sandbox`: Runs a model's program and its tests, or a reward that may hang, in a process with limits. What can't be confined isn't run
- `deepseek_nb.train.schedule`: Warm up the learning rate, then change it by a linear, cosine or warmup–stable–decay schedule, with the same values as in transformers.
- `deepseek_nb.train.tasks`: Sums, Countdown, word problems, JSON and tool calls, whose answers a program checks, with solutions for a supervised start
- `deepseek_nb.train.trainer`: Build a trainer with gradient accumulation, clipping, mixed precision, activation checkpointing and evaluation, then fine-tune a model with it.
- `deepseek_nb.train.upcycle`: Turn the feed-forward of a trained dense model into a mixture of experts: copy it, which adds parameters, or split it into parts, which saves FLOPs.
- `deepseek_nb.train.world`: Each process (rank) computes its share of a batch, and all-reduce sums losses, token counts and gradient norms over the ranks."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arch.cache import Cache as Cache
    from .arch.model import Model as Model
    from .core.config import Config as Config
    from .files.tokenizer import Tokenizer as Tokenizer
    from .quant.model import QuantizedModel as QuantizedModel
    from .train.lora import LoraConfig as LoraConfig
    from .train.optim import AdamW as AdamW
    from .train.schedule import get_linear_schedule_with_warmup as get_linear_schedule_with_warmup
    from .train.trainer import Trainer as Trainer, TrainingArguments as TrainingArguments

# The names that users import load when they are first asked for, so importing the package imports no PyTorch
_HOMES = {'Config': 'core.config', 'Cache': 'arch.cache', 'Model': 'arch.model', 'Tokenizer': 'files.tokenizer', 'QuantizedModel': 'quant.model',
          'Trainer': 'train.trainer', 'TrainingArguments': 'train.trainer', 'LoraConfig': 'train.lora', 'AdamW': 'train.optim',
          'get_linear_schedule_with_warmup': 'train.schedule'}


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module 'deepseek_nb' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    globals()[name] = getattr(import_module(f'.{_HOMES[name]}', __name__), name)
    return globals()[name]


def __dir__(): return sorted({*globals(), *_HOMES})
