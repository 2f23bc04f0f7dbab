"""DeepSeek's language models as a book that runs

Packages:

- `deepseek_nb.quant`: Weights stored as small integers and scales, which PyTorch's layers use in place of a parameter.
- `deepseek_nb.kernels`: Every operation has a readable definition and faster twins. `kernels.use` chooses between them and `kernels.twins` lists them
- `deepseek_nb.bench`: Time two implementations alternately, measure peak memory and the highest rates of a machine, plot a roofline, and store results as files.
- `deepseek_nb.studies`: An experiment has a plan that is written before it runs, and a record of every run. This chapter carries the plan out, resumes it, and opens the notebook of a study as a module.

Modules:

- `deepseek_nb.arch.attention`: Grouped-query attention (GQA), and DeepSeek's multi-head latent attention (MLA) in two forms that give the same result at different costs
- `deepseek_nb.arch.cache`: Keys and values of past tokens for GQA, one latent a token for MLA: allocated ahead, written in place, grown and rewound
- `deepseek_nb.arch.model`: A block adds attention and a feed-forward network to the residual stream. A model is an embedding, a list of blocks, a norm and a head. V3's config makes it DeepSeek-V3
- `deepseek_nb.arch.moe`: The feed-forward layers: a SwiGLU in a dense block; selected routed experts and shared experts in a mixture
- `deepseek_nb.arch.mtp`: One more block predicts the token after the next: more signal in training, and a draft for speculative decoding
- `deepseek_nb.arch.norm`: Divide each row by its root mean square and scale each channel: the normalisation in front of every attention and feed-forward
- `deepseek_nb.arch.picture`: A diagram of any release, drawn from its config, and the data flow of MLA's two forms with their FLOPs and bytes
- `deepseek_nb.arch.releases`: Parameters, active parameters, FLOPs a token and cache bytes a token of every DeepSeek model, computed from its config
- `deepseek_nb.arch.rope`: RoPE turns queries and keys by their positions, so that attention depends on distances alone; YaRN and Llama 3's rule stretch it to longer contexts
- `deepseek_nb.arch.routing`: A router selects a few experts for each token; a bias or a loss keeps the load balanced, and no token is dropped
- `deepseek_nb.arch.show`: How a notebook shows a config, a model, a cache and a routing result
- `deepseek_nb.bench.caches`: What a KV cache saves, the time to the first token with a prefix cache in memory or on disk, and the time and error of paged and quantised caches.
- `deepseek_nb.bench.conversion`: SmolLM2 converted to multi-head latent attention, to a mixture of experts, and to both: perplexity, cache, parameters, and the same answers in transformers.
- `deepseek_nb.bench.layers`: An MoE layer, an attention layer and sparse neurons beside transformers or PyTorch, and beside what the machine allows.
- `deepseek_nb.bench.limits`: FLOPs and bytes of a layer, a prompt, a decode step and a training step, counted from the config, and the least time that a machine needs for them.
- `deepseek_nb.bench.llama`: Decode, prefill and load of a 4-bit model beside llama.cpp's fastest setting, and where its greedy text differs from float32.
- `deepseek_nb.bench.models`: Prefill, decode, training steps and compiled decode of whole models beside transformers, and beside what the machine allows.
- `deepseek_nb.bench.quant`: Speed, bytes, peak memory, perplexity and error of a model in 8 and 4 bits, beside the same model in float32.
- `deepseek_nb.bench.scaling`: How time grows with tokens, experts, batch and context, and memory with context, each beside its theoretical slope.
- `deepseek_nb.bench.startup`: How long importing, loading a checkpoint and dispatching a call take, beside PyTorch and transformers.
- `deepseek_nb.bench.training`: Time and memory of a LoRA training step beside PEFT, and the memory of QLoRA beside full fine-tuning.
- `deepseek_nb.core.config`: One frozen dataclass holds every size and every choice of mechanism of a model, and reads and writes Hugging Face's `config.json`
- `deepseek_nb.core.device`: Where tensors go, in which precision weights are kept, and how large tensors get memory that a processor reads fast
- `deepseek_nb.core.dispatch`: A readable definition, faster implementations with the same parameters, and a registry that picks the best one for each call
- `deepseek_nb.core.lazy`: A class offers all its methods, and an operation all its implementations, whichever chapter was imported first: the chapter that adds one is imported when it is first used
- `deepseek_nb.core.nbproc`: Cells that begin with `%%cpp` or `%%cu` are compiled where they stand, and exported as source files of the package
- `deepseek_nb.core.plot`: Plots that read well on light and on dark pages, in colours that colour-blind readers can tell apart
- `deepseek_nb.core.reading`: The conventions of all chapters, each with a small example that runs: documented parameters, names of axes, methods that later chapters add, operations with several implementations, and C++ cells
- `deepseek_nb.cuda.attention`: Attention over the latent KV cache on tensor cores, with the cache split over multiprocessors and read once, also ragged and paged.
- `deepseek_nb.cuda.build`: A `.cu` file is compiled for the GPU or the CPU when it is first launched, with NVRTC, nvcc, or a C++ compiler and the emulation.
- `deepseek_nb.cuda.device`: Number formats, tensor-core instructions and asynchronous copies, as PTX for the GPU and as plain C++ for the CPU, and how Python passes arguments to a kernel.
- `deepseek_nb.cuda.emulation`: A C++ header that runs the threads of a CUDA block as fibers, so that kernels are tested without a GPU and in several orders of threads.
- `deepseek_nb.cuda.experts`: The routed experts of a layer in CUDA C++: one launch for all experts, SwiGLU in the first product, and no copy of the tokens.
- `deepseek_nb.cuda.fp8`: DeepSeek-V3's FP8 matrix product on a GPU, with a scale for each 128 activations and each 128×128 block of weights, and float32 sums every 128 columns.
- `deepseek_nb.cuda.int8`: Linear layers with 8-bit weights and activations (W8A8) on a GPU: activations are rounded in blocks of 32, tensor cores multiply the integers, and a GEMV handles one token.
- `deepseek_nb.cuda.norm`: The norm and the rotation of MLA's latent in one kernel that reads and writes it once, and rotary embedding of queries.
- `deepseek_nb.cuda.quant`: Linear layers with int4 and int8 weights on a GPU: weights decoded to bfloat16 in registers, and the CUDA twins of quantised layers.
- `deepseek_nb.cuda.quant_experts`: Grouped int8 and int4 experts on a GPU: only the experts that the batch selects are read, and decoded in registers.
- `deepseek_nb.cuda.route`: CUDA kernels of a mixture of experts: expert selection with one warp per token, a counting sort of tokens by expert, and the weighted sum of the experts' outputs.
- `deepseek_nb.cuda.tiles`: A matrix product in tiles: asynchronous copies in a pipeline, a shared-memory layout without bank conflicts, and `mma.sync` or `wgmma`.
- `deepseek_nb.eval.choice`: Scores each answer of a question by its log-likelihood and counts how often the right one wins, with the definitions of lm-evaluation-harness.
- `deepseek_nb.eval.classify`: Accuracy, macro-F1 and micro-F1 from one confusion matrix, bootstrap confidence intervals, and the calibration error of a model's probabilities.
- `deepseek_nb.eval.perplexity`: Measures how well a model predicts a text: the number of equally likely tokens that its uncertainty corresponds to, on a text longer than its context.
- `deepseek_nb.eval.quality`: Size, perplexity and decoding speed of every quantisation format, on SmolLM2 and on a small mixture of experts trained in float32 for this purpose.
- `deepseek_nb.files.chat`: A conversation becomes a prompt by the checkpoint's own chat template, rendered exactly as transformers renders it. Control tokens inside a message stay plain text.
- `deepseek_nb.files.checkpoint`: A folder of safetensors is streamed into a model, DeepSeek's FP8 weights included, and written back in a form that transformers loads. A key that doesn't fit is an error.
- `deepseek_nb.files.gguf`: llama.cpp's file format: one file with metadata, tokenizer and quantised weights. This chapter reads a config from the metadata and fills a model from the tensors.
- `deepseek_nb.files.hub`: Turns a folder, a Hugging Face id or a registered name into files on this machine. A download is checked, cached, and needed only once.
- `deepseek_nb.files.locate`: A path or a name becomes a folder or a file on this machine, and its config can be read without its weights.
- `deepseek_nb.files.safetensors`: Weights are read from safetensors files one tensor at a time, with flat memory use. A new file gets its name only when it is complete.
- `deepseek_nb.files.tokenizer`: Text becomes token ids, and token ids become text again, with the vocabulary of a `tokenizer.json` or of a GGUF file. Control tokens in a user's text stay plain text.
- `deepseek_nb.infer.conversation`: A conversation keeps its messages and its KV cache, so each turn computes only the new tokens. It measures prefill and decode separately.
- `deepseek_nb.infer.generate`: Turns the logits of a model into tokens and text: greedy or sampled, for one prompt or a padded batch, all at once or streamed, with stop strings.
- `deepseek_nb.infer.inside`: Shows the residual stream, attention patterns, the logit lens and the expert load of a model for a given text.
- `deepseek_nb.infer.load`: `Model.from_pretrained` finds a checkpoint and loads it: a GGUF file on its own quantised blocks, a folder in floats, or in any format or dtype that is named.
- `deepseek_nb.infer.paged`: Stores the KV cache of all sequences in fixed-size pages of one pool, as in vLLM. Memory is bounded, little of it is wasted, and sequences share the pages of a common prefix.
- `deepseek_nb.infer.persist`: Pages of the KV cache are kept as files, so a prompt survives a restart. A file is found by a hash of its content, checked when it is read, and never trusted if damaged.
- `deepseek_nb.infer.prefix`: The KV cache of earlier prompts is shared between requests: a prompt that begins like an earlier one is computed only from where it differs. Hits and misses are counted as DeepSeek's API counts them.
- `deepseek_nb.infer.quant_cache`: Latents, keys and values of the KV cache in 8 bits, which takes less than half of its memory.
- `deepseek_nb.infer.radix`: A tree over token ids says which pages of the KV cache hold which prompts. Prompts with a common prefix share its pages, and the least recently used pages are evicted first.
- `deepseek_nb.infer.ragged`: Sequences of different lengths share one forward pass: some bring a chunk of a prompt, others one new token, and each gets the result that it would get alone.
- `deepseek_nb.kernels.attention`: FlashAttention and flash-decoding for GQA and MLA, prompts and decode steps: every thread gets an equal share of the keys
- `deepseek_nb.kernels.build`: Compile a C++ kernel for the processor of this machine, store the library in a cache, and load it as PyTorch operators.
- `deepseek_nb.kernels.codes`: Products of int8 or int4 weights with activations that are rounded to int8 on the way, by the processor's byte instructions
- `deepseek_nb.kernels.compile`: `model.compile()` turns the decode step into one graph, traced once for every cache length
- `deepseek_nb.kernels.flash`: Attention over blocks of keys with an online softmax: each query keeps a running maximum and sum, so the matrix of scores is never stored
- `deepseek_nb.kernels.gemm`: The matrix product behind all CPU kernels: dot products along a row of weights for a few tokens, register tiles across tokens for many
- `deepseek_nb.kernels.ggml`: A few rows of a quantised GGUF weight are decoded into the first-level cache, multiplied by every token, and overwritten by the next rows
- `deepseek_nb.kernels.gradients`: SwiGLU, RMSNorm and causal attention with their gradients, each in one pass over memory, for training with frozen weights
- `deepseek_nb.kernels.invariant`: Products whose result for a token has the same bits, whichever other tokens are multiplied in the same call.
- `deepseek_nb.kernels.moe`: Dropless routing and experts as one kernel: tokens are sorted by expert and read where they lie, and weighted results are added in place
- `deepseek_nb.kernels.norm`: Normalisation and rotary positions are memory-bound: one pass in C++ reads and writes each number once
- `deepseek_nb.kernels.paged`: Attention of a ragged batch reads keys and values in their pages, without a copy, and gives each query the same bits in any company.
- `deepseek_nb.kernels.panels`: Sixteen rows of an int8 or int4 weight side by side, in the order in which a processor's integer instructions read them
- `deepseek_nb.kernels.ragged`: All blocks of a model run on rows of different lengths in one C++ call, through pages, and each row gets the bits that it gets alone.
- `deepseek_nb.kernels.ragged_codes`: Quantised models serve rows of different lengths in one C++ call, with the same bits as for each row alone.
- `deepseek_nb.kernels.simd`: One source for AVX-512, AVX2, NEON and others: a vector type, sums over its lanes, an exponential and a transposition
- `deepseek_nb.kernels.stages`: Computes the attention and the feed-forward of a transformer block in C++, as stages of one team of threads with barriers between them.
- `deepseek_nb.kernels.step`: Runs all transformer blocks of a decode step in one C++ call, instead of dozens of PyTorch calls per layer.
- `deepseek_nb.kernels.step_codes`: Runs all transformer blocks of a quantised model in one C++ call: the stages of the float step, with packed codes as matrices.
- `deepseek_nb.kernels.team`: A kernel of several stages starts its threads once and synchronises them with a barrier between the stages
- `deepseek_nb.kernels.train`: Gradients of routed experts, causal attention and RMSNorm in PyTorch, written by hand to move less memory than autograd's
- `deepseek_nb.quant.fp4`: The format of DeepSeek-V4's experts (MXFP4): E2M1 numbers of 4 bits, with a power of two as the scale of 32 neighbours.
- `deepseek_nb.quant.fp8`: The format of DeepSeek-V3's checkpoint, E4M3 with one scale for each block of 128×128, kept and used as published.
- `deepseek_nb.quant.ggml`: A GGUF file's Q8_0, Q4_0, Q4_1, Q4_K and Q6_K blocks as a format, so that a model multiplies what the file holds instead of a float32 copy.
- `deepseek_nb.quant.gptq`: Rounding to four bits with calibration data: the weights that are rounded later compensate for the errors of those before.
- `deepseek_nb.quant.int4`: Weights in 4 bits: 32 neighbours share a scale, or a scale and a minimum, and each is one of sixteen evenly spaced levels.
- `deepseek_nb.quant.int8`: Weights and activations in 8 bits (W8A8), with one scale for each output channel or group: a quarter of float32's memory for a small error.
- `deepseek_nb.quant.model`: Quantise a model in memory or while it is loaded, choose the format of each parameter, and keep the quantised blocks of GGUF files.
- `deepseek_nb.quant.nf4`: Sixteen levels at the quantiles of a normal distribution, with scales that are themselves quantised to 8 bits.
- `deepseek_nb.quant.report`: Every parameter of a model with its format, its bytes and its relative error, or the reason why it stayed float.
- `deepseek_nb.quant.save`: A quantised model as a folder of safetensors, written atomically and mapped into memory when it is loaded.
- `deepseek_nb.quant.stream`: A checkpoint is read and quantised some rows at a time, so that a quantised model never needs the memory of its float32 weights.
- `deepseek_nb.serve.sampling`: In a server, each row of a batch has its own temperature, penalties, seed and grammar. A row's draws never depend on its neighbours.
- `deepseek_nb.studies.report`: How the studies sum up their records: a mean with its standard deviation over seeds, tables, plots with error bars, and one sentence about what was run.
- `deepseek_nb.studies.texts`: Functions that the studies share: find test texts that occur in the training texts, remove them, limit the number of texts per class, and choose a learning rate on validation texts.
- `deepseek_nb.tools.book`: Chapters, parts and reading paths, read from the notebooks, so that the front page, the README, the sidebar and the map agree.
- `deepseek_nb.tools.claims`: Every claim beside the command that measures it, what was found, on which machine and when, and *not yet* where nothing was measured.
- `deepseek_nb.tools.cli`: The command `deepseek-nb`, with one thin function for each verb: chat, generate, quantize, finetune, eval, bench and others.
- `deepseek_nb.tools.doctor`: What this machine offers: device, processor, threads, compilers, kernels, memory and cache folder, and what each missing thing would be for.
- `deepseek_nb.tools.front`: What the front page, the table of contents, the README and the changelog say of the chapters is written by one command.
- `deepseek_nb.tools.glossary`: Each term has one sentence and the chapter that explains it, and its first use on a page links to its entry.
- `deepseek_nb.tools.moves`: The address that a page once had leads to where its text is now, and the changelog lists the moves from the same file.
- `deepseek_nb.tools.pictures`: A token's way through DeepSeek-V3, measured rates beside peers, and a map of the book: three SVG files made from data.
- `deepseek_nb.tools.site`: Each notebook becomes a page with its code, its stored outputs and its links, without running a cell and without another host.
- `deepseek_nb.train.balance`: Without load balancing a router sends most tokens to a few experts. V3 corrects this with a bias per expert and a small sequence-wise loss.
- `deepseek_nb.train.bpe`: Byte-level BPE merges are learnt from text, with DeepSeek-V3's word splitting, and saved in Hugging Face's tokenizer format.
- `deepseek_nb.train.callbacks`: Callbacks act at named events of a training run: they show its progress, draw its loss, and stop it before it diverges.
- `deepseek_nb.train.convert`: One call converts a trained model to latent attention, to a mixture of experts, or to single neurons as experts, and repairs it. Attention and experts together are a DeepSeek-V3.
- `deepseek_nb.train.corpora`: Prose, plays, speeches, dictionary entries, diagnoses and exam questions, downloaded from package registries and checked against pinned hashes.
- `deepseek_nb.train.data`: Text is tokenised, packed into rows of one length and read in shuffled batches. A killed run resumes at the exact batch where it stopped.
- `deepseek_nb.train.distill`: A student model learns from a teacher's probabilities for every token of the vocabulary, not only from the one token in the text.
- `deepseek_nb.train.dynamic`: A mixture of experts spends the same FLOPs on every token. Four rules spend less where less is enough, within a budget, and a training method prepares a model for it.
- `deepseek_nb.train.esft`: A task activates only a few of a model's experts. ESFT trains those and freezes everything else.
- `deepseek_nb.train.frozen`: When only adapters learn, half a block keeps its input and little else, and its backward pass multiplies by each frozen weight once
- `deepseek_nb.train.latent`: A trained model with grouped-query attention becomes a model with multi-head latent attention, with a smaller KV cache and DeepSeek-V3's architecture. What is exact is kept exact.
- `deepseek_nb.train.lora`: Low-rank adapters fine-tune a frozen model with a small share of its parameters, and can be swapped, merged and mixed in a batch.
- `deepseek_nb.train.loss`: Cross-entropy summed over scored tokens, with logits computed a chunk at a time so that they never fill memory
- `deepseek_nb.train.mini`: Pre-train a model with the DeepSeek-V3 architecture, 6.6 million parameters and its own tokenizer on public text, and evaluate it on held-out documents.
- `deepseek_nb.train.neurons`: The finest mixture of experts: every neuron of a feed-forward is an expert, and one half of the neuron is its router. At 70% of the FLOPs its squared error is about a quarter of that of experts with 16 neurons.
- `deepseek_nb.train.on_policy`: The student generates text and the teacher scores it. A guard stops the run if the student's text collapses.
- `deepseek_nb.train.optim`: AdamW scales each gradient element by its history. Muon orthogonalises the momentum of whole matrices, as DeepSeek-V4 does.
- `deepseek_nb.train.parallel`: A training step shared by several processes, with data, fully sharded or expert parallelism, each equal to one process.
- `deepseek_nb.train.peft`: Saving and loading LoRA adapters in PEFT's layout, so that they can be exchanged with transformers in both directions.
- `deepseek_nb.train.qlora`: LoRA on a quantised model: gradients pass through int8, int4 or NF4 weights without dequantising a whole matrix.
- `deepseek_nb.train.repair`: Each converted block is trained alone, or fitted in closed form, to give what the original block gave. It needs no labels and little memory, and continues after an interruption.
- `deepseek_nb.train.resume`: A training run that was killed at any step resumes from its last checkpoint with the same bits as an uninterrupted run.
- `deepseek_nb.train.rotary_pairs`: Multi-head latent attention has one rotary key for all heads. This chapter finds which rotary pairs of a GQA model it can keep, and what the others lose when they stop rotating.
- `deepseek_nb.train.runs`: One TOML file describes a fine-tuning, a distillation or a conversion, and an interrupted run resumes when it is called again.
- `deepseek_nb.train.schedule`: Warmup, then a linear, cosine or warmup–stable–decay schedule, each equal to that of transformers at every step.
- `deepseek_nb.train.sft`: Rows with text, messages, prompt and completion, or classes become training examples. Only the answer counts in the loss.
- `deepseek_nb.train.split`: Rows that share a key never lie on both sides of a split, and shared n-grams show how much of a test was in the training text.
- `deepseek_nb.train.stages`: Distillation as a list of stages, from a general to a domain teacher or through an assistant model, resumable at any point.
- `deepseek_nb.train.teacher`: A teacher's answers are computed once and stored: all logits, the top-k with the mass of the rest, or generated text.
- `deepseek_nb.train.trainer`: Build a trainer with gradient accumulation, clipping, mixed precision, activation checkpointing and evaluation, then fine-tune a model with it.
- `deepseek_nb.train.upcycle`: The feed-forward of a trained dense model becomes a mixture of experts: as copies, which add parameters, or split into parts, which save FLOPs, with a router fitted in closed form.
- `deepseek_nb.train.world`: Each process (rank) gets its share of a batch, and all-reduce adds up losses, token counts and gradient norms over the ranks."""

__version__ = "0.1.0"

from importlib import import_module

# The names that users import load when they are first asked for, so importing the package imports no PyTorch
_HOMES = {'Config': 'core.config', 'Cache': 'arch.cache', 'Model': 'arch.model', 'Tokenizer': 'files.tokenizer', 'QuantizedModel': 'quant.model',
          'Trainer': 'train.trainer', 'TrainingArguments': 'train.trainer', 'LoraConfig': 'train.lora', 'AdamW': 'train.optim',
          'get_linear_schedule_with_warmup': 'train.schedule'}


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module 'deepseek_nb' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    globals()[name] = getattr(import_module(f'.{_HOMES[name]}', __name__), name)
    return globals()[name]


def __dir__(): return sorted({*globals(), *_HOMES})
