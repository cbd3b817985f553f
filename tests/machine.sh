#!/bin/sh
# Boot a private systemd: machine.sh STAGE PROJECT PACKAGES, within namespaces of its own.
#
# The new machine sees this one through an overlay: whatever it writes is gone with it. STAGE is an
# empty folder to build it in. PROJECT appears as /srv/project. PACKAGES, a site-packages that
# holds what Swipr needs, appears as /srv/packages, and an environment in /opt/swipr finds it there,
# so that `make install` need not bring gigabytes again.
set -eu
stage=$1 project=$2 packages=$3

mount --make-rprivate /
mount -t tmpfs -o mode=755 machine "$stage"
cd "$stage"
overlay() { # NAME LOWER TARGET
    mkdir "$1" "$1.work"
    mount -t overlay -o "lowerdir=$2,upperdir=$1,workdir=$1.work" "$1" "$3"
}
mkdir root
overlay system / root
mount -t proc proc root/proc
# Of /proc/sys there is one for all: systemd must not set it.
mount --bind root/proc/sys root/proc/sys
mount -o remount,bind,ro root/proc/sys
mount --rbind /sys root/sys
mount -t tmpfs -o mode=755 tmpfs root/dev
for device in null zero full random urandom tty; do
    cp --archive /dev/$device root/dev
done
mkdir root/dev/pts root/dev/shm
ln -s /proc/self/fd root/dev/fd
ln -s pts/ptmx root/dev/ptmx
mount -t cgroup2 cgroup2 root/sys/fs/cgroup
# Systemd empties some of these, and the units of this machine are not wanted.
for folder in run etc/systemd/system; do
    mount -t tmpfs -o mode=755 tmpfs root/$folder
done
for folder in tmp var/tmp; do
    mount -t tmpfs -o mode=1777 tmpfs root/$folder
done

mkdir root/srv/project
overlay project "$project" root/srv/project
mkdir root/srv/packages
mount --bind "$packages" root/srv/packages
/usr/bin/python3 -m venv --without-pip root/opt/swipr
sed -i "s|$stage/root||" root/opt/swipr/pyvenv.cfg
touch root/opt/swipr/.swipr  # as `make install` marks what is its own
for folder in root/opt/swipr/lib/python3*/site-packages; do
    echo /srv/packages >"$folder/packages.pth"
done

mkdir root/run/units root/run/old
for target in sysinit basic sockets slices paths timers local-fs shutdown umount final; do
    cp /lib/systemd/system/$target.target root/run/units
done
cp /lib/systemd/system/systemd-journald.socket /lib/systemd/system/systemd-journald.service \
    /lib/systemd/system/systemd-journald-dev-log.socket root/run/units

cd root
pivot_root . run/old
umount --lazy /run/old
rmdir /run/old
exec env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin container=swipr-test \
    SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/units:/usr/local/lib/systemd/system \
    /lib/systemd/systemd --system --unit=basic.target
