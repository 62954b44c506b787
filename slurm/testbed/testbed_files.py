"""The configuration files of a testbed's daemons, by SLURM's version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CPUS_PER_NODE = 8
GPUS_PER_NODE = 2
GRACE_S = 5
"""How long a preempted job of partition `low` has at the least between SIGTERM and its end."""
LOW_MINUTES, HIGH_MINUTES = 120, 60
"""MaxTime of the partitions; more is refused by sbatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the files of one testbed say of it."""

    dir: Path
    cluster: str
    nodes: tuple[str, ...]
    host: str
    address: str
    first_port: int
    user: str
    version: tuple[int, int]
    """SLURM's year and month, like (22, 5)."""
    send_user_signal: bool


def texts(layout: Layout) -> dict[str, str]:
    """Returns file name → text, of all that goes into etc/."""
    return {
        "slurm.conf": _slurm_conf(layout),
        "slurmdbd.conf": _slurmdbd_conf(layout),
        "gres.conf": f"Name=gpu File={layout.dir}/gpu/gpu[0-{GPUS_PER_NODE - 1}]\n",
        "cgroup.conf": f"CgroupPlugin={'disabled' if layout.version >= (23, 2) else 'cgroup/v1'}\n",
    }


def _slurm_conf(layout: Layout) -> str:
    dir, address, port = layout.dir, layout.address, layout.first_port
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr={address} Port={port + 2 + index} "
        f"CPUs={CPUS_PER_NODE} RealMemory=16000 Gres=gpu:{GPUS_PER_NODE}"
        for index, name in enumerate(layout.nodes)
    )
    return f"""\
ClusterName={layout.cluster}
SlurmctldHost={layout.host}({address})
SlurmctldPort={port}
SlurmUser={layout.user}
SlurmdUser={layout.user}
# Everybody listens at the address of the machine's own name only, not at all addresses.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny

AuthType=auth/munge
# A requeued job waits until its old credential has expired: 120 s by default.
AuthInfo=socket={dir}/run/munge.socket,cred_expire=5

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={port + 1}
AccountingStoragePass={dir}/run/munge.socket
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/none

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides

SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{"SlurmctldParameters=preempt_send_user_signal" if layout.send_user_signal else ""}
JobRequeue=1
EnforcePartLimits=ALL
KillWait=3
ReturnToService=2
SlurmdTimeout=9
MessageTimeout=5
BatchStartTimeout=10

StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose

{nodes}
PartitionName=low Default=YES Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S} DefaultTime=60 MaxTime={LOW_MINUTES}
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF DefaultTime=60 MaxTime={HIGH_MINUTES}
"""


def _slurmdbd_conf(layout: Layout) -> str:
    """No password: MariaDB asks the kernel who is at its socket, whose path is in MARIADB_UNIX_PORT."""
    return f"""\
AuthType=auth/munge
AuthInfo=socket={layout.dir}/run/munge.socket
DbdHost={layout.host}
DbdAddr={layout.address}
DbdPort={layout.first_port + 1}
CommunicationParameters=NoInAddrAny
SlurmUser={layout.user}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={layout.user}
StorageLoc=slurm_acct
PidFile={layout.dir}/run/slurmdbd.pid
LogFile={layout.dir}/log/slurmdbd.log
DebugLevel=verbose
"""
