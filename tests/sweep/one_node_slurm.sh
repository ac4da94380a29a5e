#!/usr/bin/env bash
# A SLURM cluster of this one machine, from Debian's slurmctld, slurmd, slurm-client and munge, without systemd. Takes root.
# one_node_slurm.sh start | stop
set -euo pipefail
if [ "$1" = stop ]; then
    for _ in $(seq 60); do # a job that has reported its result is still to end
        squeue --noheader | grep -q . || break
        sleep 0.5
    done
    scontrol shutdown
    kill "$(cat /run/munge/munged.pid)"
    exit
fi
host=$(hostname)
mkdir -p /run/munge /var/spool/slurmd /var/spool/slurmctld
[ -f /etc/munge/munge.key ] || mungekey
chown -R munge /run/munge /etc/munge
su -s /bin/sh munge -c /usr/sbin/munged
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
AuthInfo=cred_expire=5
KillWait=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
ReturnToService=2
GresTypes=gpu
NodeName=$host CPUs=$(nproc) Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
cat >/etc/slurm/gres.conf <<CONF # fake: files that exist
Name=gpu File=/dev/null
Name=gpu File=/dev/zero
CONF
slurmctld -c # forgets the jobs of an earlier cluster, which would keep the node busy
slurmd -c
for _ in $(seq 60); do
    sinfo --noheader --format=%T | grep -qx idle && exit
    sleep 0.5
done
sinfo
exit 1
