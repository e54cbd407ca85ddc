"""The help texts of the `mopd` command."""

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
