# shellcheck shell=bash
# A two-node Slurm cluster on this machine, for tests/slurm/run.sh: sourced; `cluster_up FOLDER` and `cluster_down`.
# CPUs and memory are fictional (config_overrides); both slurmd share this machine, so there is nothing to isolate.

cluster_up() {  # FOLDER
  CLUSTER=$1
  local host
  host=$(hostname -s)
  mkdir -p "$CLUSTER"/{run,spool/n1,spool/n2,state,log} /run/munge
  chmod 755 "$CLUSTER"
  cat >"$CLUSTER/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=15
CredType=cred/munge
SlurmctldPort=17700
SlurmctldPidFile=$CLUSTER/run/slurmctld.pid
SlurmdPidFile=$CLUSTER/run/slurmd-%n.pid
SlurmdSpoolDir=$CLUSTER/spool/%n
StateSaveLocation=$CLUSTER/state
SlurmctldLogFile=$CLUSTER/log/slurmctld.log
SlurmdLogFile=$CLUSTER/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MinJobAge=3600
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc=$CLUSTER/log/jobcomp.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17801-17802] CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN
PartitionName=batch Nodes=n[1-2] Default=YES OverSubscribe=YES MaxTime=INFINITE OverTimeLimit=0 State=UP
CONF
  export SLURM_CONF="$CLUSTER/slurm.conf"
  chown munge:munge /run/munge
  su -s /bin/sh munge -c "/usr/sbin/munged --pid-file=/run/munge/munged.pid" || true
  slurmctld -i
  start_node n1
  start_node n2
  local _
  for _ in $(seq 60); do
    if [[ $(sinfo -h -N -t idle 2>/dev/null | wc -l) == 2 ]]; then return; fi
    sleep 0.5
  done
  echo "the cluster did not come up within 30 s:" >&2
  sinfo -N >&2
  return 1
}

start_node() { slurmd -N "$1" -f "$SLURM_CONF"; }

end_pid_file() {  # FILE SIGNAL
  if [[ -s $1 ]]; then kill -s "$2" "$(cat "$1")" 2>/dev/null || true; fi
}

cluster_down() {
  scancel -u root 2>/dev/null || true
  sleep 3
  end_pid_file "$CLUSTER/run/slurmd-n1.pid" TERM
  end_pid_file "$CLUSTER/run/slurmd-n2.pid" TERM
  end_pid_file "$CLUSTER/run/slurmctld.pid" TERM
  end_pid_file /run/munge/munged.pid TERM
}
