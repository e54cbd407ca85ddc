"""What `mopd --help` and `mopd COMMAND --help` say."""

DESCRIPTION = """\
Multi-teacher on-policy distillation (MOPD) with Megatron-Core.

One YAML file is one complete run. Its `stage` says what the run does:
  sft    learn from the reference answers of the domains
  rl     learn from verified rewards (GRPO); makes a teacher
  mopd   learn from one teacher per domain, on the student's own answers
"""

EPILOG = """\
examples:
  mopd demo                                               all of it, small, on this machine's cores
  mopd run configs/tiny/mopd.yaml                         one stage
  mopd run configs/tiny/mopd.yaml steps=5 optim.lr=1e-4   the same with other values
  mopd report runs/demo                                   tables and figures, as one HTML page and Markdown
  mopd COMMAND --help                                     more on one command

exit codes:
  0           done
  2           a mistake in the configuration or its files; one line says which, and nothing was started
  130, 143    stopped by Ctrl-C or SIGTERM after saving; the same command goes on
  137         a rank was killed
  1           anything else
"""

RUN = """\
Train as CONFIG says: to its last step, on from the newest checkpoint in its run_dir if there is one.

The ranks are started on this machine: `parallel.ranks` of them, by default one per GPU, or without GPUs
the fewest that the layout needs. Under torchrun or srun (RANK and WORLD_SIZE, or SLURM_PROCID and
SLURM_NTASKS, with MASTER_ADDR and MASTER_PORT) this process is one rank of that world.

Ctrl-C or SIGTERM: the step is finished, a checkpoint saved, and the run left. A second Ctrl-C kills.
In run_dir: config.yaml (every default filled in), metrics.jsonl, tensorboard/, checkpoints/, logs/rank<r>.log
"""

RUN_EPILOG = """\
key.path=value sets one value of the file; the value is read as YAML.

examples:
  mopd run configs/tiny/sft.yaml
  mopd run configs/tiny/mopd.yaml run_dir=runs/try2 objective.kind=sampled
  mopd run configs/tiny/mopd.yaml parallel.tensor=2 parallel.ranks=4
  torchrun --nproc-per-node 8 -m megatron_mopd run CONFIG
"""

EVAL = """\
Answer the held-out prompts of CONFIG's domains with the model of a checkpoint, verify the answers, and print
as JSON, per domain: the accuracy (mean over `evaluation.samples` answers a prompt, avg@n), its standard error
clustered by prompt, and pass@k for each k of `evaluation.pass_at`. Temperature 0 is greedy decoding.

The prompts depend on `evaluation.seed` only, so that checkpoints can be compared; training never sees them.
`--split validation` takes the `evaluation.validation_prompts` for choosing hyper-parameters instead. Also
evaluated, where CONFIG names them: `evaluation.benchmarks`, `evaluation.out_of_domain` (tasks that no domain
trains), and `evaluation.perplexity` (a file of texts).
"""

EVAL_EPILOG = """\
examples:
  mopd eval configs/tiny/mopd.yaml --checkpoint runs/mopd/checkpoints/latest
  mopd eval configs/tiny/mopd.yaml --checkpoint my-hf-model evaluation.samples=4 evaluation.pass_at=[1,4]
  mopd eval CONFIG --checkpoint runs/mopd/checkpoints/latest --split validation
"""

EXPORT = """\
Write a checkpoint as a Hugging Face folder: safetensors, config.json and the tokenizer, which `transformers`
and inference servers load.
"""

EXPORT_EPILOG = """\
examples:
  mopd export configs/tiny/mopd.yaml --checkpoint runs/mopd/checkpoints/latest --hf exported/student
"""

DEMO = """\
All of MOPD in minutes on two CPU cores: an SFT base, three domain teachers trained from it by RL, one
student that learns from all three on its own answers, and a table that says how much of each it inherited.

An interrupted demo goes on where it stopped. It leaves summary.json and report/report.html in the run folder.
"""

DEMO_EPILOG = """\
examples:
  mopd demo
  mopd demo --run-dir runs/demo2 seed=1
  mopd demo --student mopd_sglang      two SGLang servers sample; same base and teachers
"""

REPRODUCE = """\
Compare methods: a base, its teachers and every method for every seed, evaluated on the same held-out prompts.

CONFIG is a graph of runs, samples and merges. Each is an ordinary command on an ordinary file and is made once:
its result is kept for as long as nothing that it depends on changes (files, values, datasets, other results).
Ctrl-C, kill -9 or a failure cost the steps since the last checkpoint: the same command goes on.
Prints the table with 95 % intervals over seeds, and writes summary.json for `mopd report`.
"""

REPRODUCE_EPILOG = """\
examples:
  mopd reproduce configs/tiny/reproduce.yaml --dry-run     what would be made, at what cost
  mopd reproduce configs/tiny/reproduce.yaml --seeds 1     one seed of all
  mopd reproduce configs/tiny/reproduce.yaml --only mopd   one method, with what it needs
  mopd reproduce configs/tiny/reproduce.yaml --tune        the trials, on the validation split
"""

REPORT = """\
Tables and figures of what runs found: report.html, one file that needs nothing else, report.md, and each figure
as PNG and PDF. RUN is the folder of a `mopd reproduce`, of a `mopd demo` or of a single run; several are
reported together. What a folder does not have is said in its section.
"""

REPORT_EPILOG = """\
examples:
  mopd report runs/tiny/reproduce
  mopd report runs/tiny/reproduce runs/tiny/scaling --out paper/report
  mopd report runs/mopd runs/mopd_sampled
"""

BENCHMARK = """\
Write a benchmark's questions as a prompt file that a domain's source reads, from a file of yours or, when the
package `datasets` is installed, from the Hub: --from hub:OWNER/NAME:SPLIT. FILE is .jsonl, .json or .parquet.

  NAME                 columns                                                              verifier
  aime25, aime26       problem, answer                                                      math
  ifeval               prompt, instruction_id_list, kwargs                                  ifeval
  ifbench              prompt, instruction_id_list, kwargs                                  command
  swe_bench_verified   instance_id, repo, base_commit, problem_statement, patch             command

The commands are `python -m megatron_mopd.domains.ifbench` and `python -m megatron_mopd.domains.swe_bench`; they
run the benchmarks' own programs, which must be installed. A program of your own: see domains/command.py.
"""

BENCHMARK_EPILOG = """\
examples:
  mopd benchmark ifeval --from input_data.jsonl --out data/ifeval.jsonl
  mopd benchmark aime25 --from hub:math-ai/aime25:test --out data/aime25.jsonl
"""

SAMPLE = """\
Let every teacher answer its domains' training prompts and write the answers to a file that `rollout.engine: dataset`
learns from: the off-policy baselines. CONFIG is the file of a mopd run; steps x prompts_per_step prompts are
answered rollout.samples_per_prompt times each.
"""

SAMPLE_EPILOG = """\
examples:
  mopd sample configs/tiny/off_policy_kl.yaml --out runs/tiny/teacher_answers.jsonl
  mopd sample configs/tiny/mopd.yaml --out answers.jsonl --keep correct rollout.samples_per_prompt=4
"""

MERGE = """\
Merge the weights of several checkpoints into one Hugging Face folder, as CONFIG says: average, task_arithmetic,
ties, dare, dare_ties or sce. Tensors are streamed in slices: the memory is that of a slice, not of a model.

Everything is checked first. The folder appears when it is complete; called again, there is nothing to do.
"""

MERGE_EPILOG = """\
examples:
  mopd merge configs/tiny/param_merge.yaml
  mopd merge configs/tiny/param_merge.yaml scaling=0.5 out=runs/tiny/merged/lambda_0.5
  mopd merge configs/tiny/param_merge.yaml method=ties density=0.3 out=runs/tiny/merged/ties
"""

AUDIT = """\
Sample prompts of every domain with the rollout engine of CONFIG and score the same tokens with the engine
again, with the Megatron student, and with a teacher that the bank loads from the student's checkpoint; with
--reference also with transformers in float32. Says which of chat template, temperature, dtype, routing and
engine explains what differs, with the numbers. Servers that CONFIG launches are started and stopped. See
docs/audit.md.

Exit code 0: within tolerance (float32: max |difference| of log-probs; bfloat16: KL by k3, and max < 1). 1: not.
"""

AUDIT_EPILOG = """\
examples:
  mopd audit configs/tiny/mopd_sglang.yaml --json audit.json
  mopd audit configs/tiny/mopd.yaml --reference --prompts 16 model.checkpoint=runs/mopd/checkpoints/latest
  mopd audit configs/tiny/mopd.yaml parallel.tensor=2 parallel.expert=2 model.dtype=bfloat16
"""

PLAN = """\
What a run needs, before it is queued: parameters, GB of a GPU part by part, host memory of the teachers, bytes moved
and FLOPs of a step, and the least time and GPU-hours by data-sheet ceilings. Parameters are counted on the real
Megatron model, built without memory; no GPU is touched and nothing is downloaded.

Every figure says how it was obtained: counted, formula, measured, assumed, given, or ceiling (at best; nothing ran at
that speed). A model that is not here yet: a folder `model` beside CONFIG or above it stands for it, or --model.
Without --gpus, the fewest ranks of the layout; without --device, H100s for bfloat16 and this machine's cores for
float32.
"""

PLAN_EPILOG = """\
examples:
  mopd plan configs/qwen3_30b_a3b/mopd.yaml --gpus 64 --rollout-gpus 64
  mopd plan configs/qwen3_30b_a3b/mopd.yaml --suggest --gpus 128 --json
  mopd plan configs/qwen3_30b_a3b/mopd.yaml --gpus 64 --rollout-gpus 64 --simulate --lag 1 --efficiency 0.4
  mopd plan configs/tiny/mopd.yaml
  mopd plan --scale-table
"""
