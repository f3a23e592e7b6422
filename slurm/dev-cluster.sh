#!/usr/bin/env bash
# A Slurm cluster on this one machine, for development and tests: three nodes of four CPUs (claimed, not real) and two
# fake GPUs each, a partition `cpu`, and a partition `high` whose jobs preempt those of `cpu`.
#
#   slurm/dev-cluster.sh up        start it, or what of it has died; prints the export line that a shell needs:
#                                  eval "$(slurm/dev-cluster.sh up)"
#   slurm/dev-cluster.sh status    daemons and nodes
#   slurm/dev-cluster.sh down      cancel its jobs and stop it
#
# Needs Debian's or Ubuntu's slurm-wlm and munge; root or a plain user. Its files lie in $TLEARN_SLURM_DIR (default
# /tmp/tlearn-slurm-$UID; a short path, since sockets have 108 characters). It listens on loopback ports below 32768.
set -euo pipefail

dir=${TLEARN_SLURM_DIR:-/tmp/tlearn-slurm-$(id -u)}
nodes="127.0.0.2 127.0.0.3 127.0.0.4"   # addresses as names: they resolve everywhere
export SLURM_CONF=$dir/slurm.conf
export PATH=$PATH:/usr/sbin

die() { echo "dev-cluster: $*" >&2; exit 1; }

# whether a daemon of ours lives, and no stranger under its old process id
running() { [ -f "$dir/$1.pid" ] && [ "$(cat "/proc/$(cat "$dir/$1.pid")/comm" 2>/dev/null)" = "${1%%-*}" ]; }

start() { # name command...: in the background, without a terminal, its process id in NAME.pid
  local name=$1; shift
  setsid "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
}

configure() {
  local host port user gpus i
  host=$(hostname -s) user=$(id -un)
  port=$((20000 + RANDOM % 12000))      # below the ephemeral ports, above those of training jobs
  for i in 0 1; do
    # the kernel's null device under another name; a plain user has no mknod and takes existing devices instead
    mknod "$dir/dev/nvidia$i" c 1 3 2>/dev/null || true
  done
  gpus="$dir/dev/nvidia0 $dir/dev/nvidia1"
  [ -c "$dir/dev/nvidia1" ] || gpus="/dev/null /dev/zero"
  for i in $gpus; do echo "Name=gpu File=$i"; done >"$dir/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"   # else slurmd looks for a cgroup mount that containers lack
  cat >"$dir/slurm.conf" <<CONF
ClusterName=tlearn
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=5
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/state/slurmctld.pid
SlurmdPidFile=$dir/state/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=5
MinJobAge=86400
MessageTimeout=2
TCPTimeout=1
CommunicationParameters=EnableIPv6
# job ids that differ from those of the last cluster, whose files may still lie about
FirstJobId=$((1000 + RANDOM))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
CONF
  for i in $nodes; do
    port=$((port + 1))
    echo "NodeName=$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
  done >>"$dir/slurm.conf"
  cat >>"$dir/slurm.conf" <<CONF
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

# every node answers: neither down, nor unknown, nor not responding (*)
all_answer() { ! sinfo --noheader --Node --format %T 2>&1 | grep -q 'down\|unknown\|\*\|error'; }

up() {
  local program i
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || die "$program is not installed: apt-get install slurm-wlm munge"
  done
  if ! running slurmctld || ! running munged; then
    down
    mkdir -p "$dir"/{state,spool,log,munge,dev}
    chmod 755 "$dir"; chmod 711 "$dir/munge"    # munged insists on it
    dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none; chmod 400 "$dir/munge/key"
    configure
    start munged munged --foreground --key-file="$dir/munge/key" --socket="$dir/munge/sock" \
      --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    for ((i = 0; i < 200; i++)); do [ -S "$dir/munge/sock" ] && break; sleep 0.05; done
    [ -S "$dir/munge/sock" ] || die "munged did not start; see $dir/log/munged.out"
    start slurmctld slurmctld -D
  fi
  for i in $nodes; do running "slurmd-$i" || start "slurmd-$i" slurmd -D -N "$i"; done
  for ((i = 0; i < 600; i++)); do all_answer && break; sleep 0.05; done
  all_answer || die "nodes are down after 30 s; see $dir/log and sinfo"
  echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
  local name pid i
  [ -d "$dir" ] || return 0
  [ -f "$dir/slurm.conf" ] || [ -z "$(ls -A "$dir")" ] || die "$dir holds something else; set TLEARN_SLURM_DIR"
  if running slurmctld; then
    scancel --user="$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 200; i++)); do [ -z "$(squeue --noheader 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  for name in $(printf 'slurmd-%s ' $nodes) slurmctld munged; do
    ! running "$name" || kill "$(cat "$dir/$name.pid")"
  done
  for name in $(printf 'slurmd-%s ' $nodes) slurmctld munged; do
    for ((i = 0; i < 100; i++)); do running "$name" || break; sleep 0.1; done
    ! running "$name" || kill -9 "$(cat "$dir/$name.pid")" 2>/dev/null || true
  done
  # what its daemons started and did not end: known by the cluster's own configuration in their environment
  for pid in $(grep -lsz "^SLURM_CONF=$SLURM_CONF$" /proc/[0-9]*/environ | cut -d/ -f3); do
    case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmstepd | slurmd | srun) kill -9 "$pid" 2>/dev/null || true ;; esac
  done
  rm -rf "$dir"
}

status() {
  local name
  for name in munged slurmctld $(printf 'slurmd-%s ' $nodes); do
    if running "$name"; then echo "$name: running, process $(cat "$dir/$name.pid")"; else echo "$name: not running"; fi
  done
  ! running slurmctld || sinfo
}

case ${1:-} in
  up | down | status) "$1" ;;
  *) die "usage: $0 up|down|status" ;;
esac
