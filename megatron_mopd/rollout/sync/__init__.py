"""The student's weights to the rollout servers: bucket by bucket, versioned, checked before they serve."""
