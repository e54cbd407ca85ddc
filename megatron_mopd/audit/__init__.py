"""`mopd audit`: where rollout engine, student and a teacher part that were loaded from the same checkpoint."""
