#!/usr/bin/env bash
# Installs a Slurm for tests/slurm, where apt can: slurmctld, slurmd, the clients and munge (about 20 s). Starts nothing.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
