/* Attempts to get out of a container, one line on stdout for each: its name, and "ok" or the name of the error.
 *
 * usage: escape forks | files: as many processes or open files as it gets; prints how many, and the error
 *        escape rights: prints its user, its effective user and its namespaces
 *        escape PID MARKER MAJOR MINOR SOCKET
 *   PID     a process outside that nobody misses
 *   MARKER  the absolute path of a file outside
 *   MAJOR MINOR  a block device of the machine
 *   SOCKET  an abstract unix socket that somebody outside listens on
 *
 * Nothing here does harm where it succeeds: calls that would have a lasting effect get arguments that the kernel refuses
 * after it has looked at the caller's rights, or set what is set already; files are opened, not written.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timex.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static pid_t outside;
static const char *marker, *abstract;
static dev_t disk;

/* Attempts return 0 if they succeed, else -1 with errno. */

static int refuse(int number) { errno = number; return -1; }

/* Mounts and namespaces */
static int do_mount(void) { return mount("none", "/escape", "tmpfs", 0, ""); }
static int do_mount_cgroup(void) { return mount("none", "/escape", "cgroup", 0, "memory"); }
static int do_bind(void) { return mount("/proc/sys", "/escape", "", MS_BIND, ""); }
static int do_remount(void) { return mount("", "/sys", "", MS_REMOUNT | MS_BIND, ""); }
static int do_umount(void) { return umount2("/proc/sys", MNT_DETACH); }
static int do_pivot_root(void) { return syscall(SYS_pivot_root, "/escape", "/escape"); }
static int do_fsopen(void) { return syscall(SYS_fsopen, "tmpfs", 0); }
static int do_open_tree(void) { return syscall(SYS_open_tree, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */); }
static int do_unshare_user(void) { return unshare(CLONE_NEWUSER); }
static int do_unshare_mount(void) { return unshare(CLONE_NEWNS); }
static int clone_with(long flags)
{
	long pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
	if (pid == 0)
		_exit(0);
	return pid < 0 ? -1 : 0;
}
static int do_clone_user(void) { return clone_with(CLONE_NEWUSER); }
static int do_clone_mount(void) { return clone_with(CLONE_NEWNS); }
static int do_clone3_user(void)
{
	unsigned long long arguments[11] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
	long pid = syscall(SYS_clone3, arguments, sizeof arguments);
	if (pid == 0)
		_exit(0);
	return pid < 0 ? -1 : 0;
}
static int do_setns(void) { return setns(open("/proc/1/ns/net", O_RDONLY), 0); }
#ifdef __x86_64__
/* The same by the calls of 32-bit programs, which have other numbers. */
static int do_unshare_user_i386(void)
{
	long result;
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(310L), "b"((long)CLONE_NEWUSER) : "memory", "cc", "r8", "r9", "r10", "r11");
	return (int)result < 0 ? refuse(-(int)result) : 0;
}
static int do_unshare_user_x32(void) { return syscall(0x40000000L | SYS_unshare, CLONE_NEWUSER); }
static int do_iopl(void) { return syscall(SYS_iopl, 3); }
static int do_ioperm(void) { return syscall(SYS_ioperm, 0x80, 1, 1); }
#else
static int do_iopl(void) { return refuse(EPERM); }
static int do_ioperm(void) { return refuse(EPERM); }
static int do_unshare_user_i386(void) { return refuse(ENOSYS); }
static int do_unshare_user_x32(void) { return refuse(ENOSYS); }
#endif

/* Files outside */
static int do_handle(void) /* what the exploit "shocker" did */
{
	struct { struct file_handle head; unsigned char bytes[128]; } handle = {.head = {.handle_bytes = 128}};
	int id, mount = open("/", O_RDONLY);
	if (name_to_handle_at(AT_FDCWD, "/", &handle.head, &id, 0)) { /* overlayfs need not have handles */
		handle.head.handle_bytes = 8;
		handle.head.handle_type = 1;
		handle.bytes[0] = 2;
	}
	return open_by_handle_at(mount, &handle.head, O_RDONLY) < 0 ? -1 : 0;
}
static int do_chroot(void)
{
	int fd = open("/", O_RDONLY | O_DIRECTORY);
	mkdir("/jail", 0700);
	if (chroot("/jail") || fchdir(fd))
		return -1;
	for (int i = 0; i < 64; i++)
		if (chdir(".."))
			return -1;
	return chroot(".") ? -1 : access(marker, F_OK);
}
static int do_proc_root(void)
{
	char path[4096];
	for (pid_t pid = 1; pid < 40; pid++) {
		snprintf(path, sizeof path, "/proc/%d/root%s", pid, marker);
		if (access(path, F_OK) == 0)
			return 0;
		snprintf(path, sizeof path, "/proc/%d/cwd/../../../../../../../..%s", pid, marker);
		if (access(path, F_OK) == 0)
			return 0;
	}
	snprintf(path, sizeof path, "/proc/%d/root%s", outside, marker);
	return access(path, F_OK);
}
static int do_descriptors(void)
{
	DIR *list = opendir("/proc/self/fd");
	struct dirent *entry;
	while ((entry = readdir(list)) != NULL) {
		int fd = atoi(entry->d_name);
		if (entry->d_name[0] != '.' && fd > 2 && fd != dirfd(list))
			return 0; /* somebody left one open for us */
	}
	return refuse(ENOENT);
}

/* Devices: made where a device may be, and read only */
static int open_device(const char *path, mode_t kind, dev_t device)
{
	unlink(path);
	if (mknod(path, kind | 0600, device))
		return -1;
	int fd = open(path, O_RDONLY);
	int saved = errno;
	unlink(path);
	errno = saved;
	return fd < 0 ? -1 : 0;
}
static int do_disk(void) { return open_device("/disk", S_IFBLK, disk); }
static int do_disk_in_dev(void) { return open_device("/dev/disk", S_IFBLK, disk); }
static int do_memory(void) { return open_device("/dev/mem", S_IFCHR, makedev(1, 1)); }
static int do_kmsg(void) { return open_device("/dev/kmsg", S_IFCHR, makedev(1, 11)); }
static int do_fuse(void) { return open_device("/dev/fuse", S_IFCHR, makedev(10, 229)); }
static int do_loop(void) { return open_device("/dev/loop-control", S_IFCHR, makedev(10, 237)); }
static int do_tun(void) /* runc lets everybody open this one, which is of no use without CAP_NET_ADMIN */
{
	struct ifreq request = {.ifr_name = "afs-escape", .ifr_flags = 1 /* IFF_TUN */};
	if (mknod("/dev/tun", S_IFCHR | 0600, makedev(10, 200)))
		return -1;
	int fd = open("/dev/tun", O_RDWR);
	return fd < 0 ? -1 : ioctl(fd, _IOW('T', 202, int) /* TUNSETIFF */, &request);
}

/* Processes outside */
static int do_kill(void) { return kill(outside, SIGKILL); }
static int do_ptrace(void) { return ptrace(PTRACE_SEIZE, outside, 0, 0); }
static int do_pidfd(void) { return syscall(SYS_pidfd_open, outside, 0); }
static int do_read_memory(void)
{
	char byte;
	struct iovec local = {&byte, 1}, remote = {(void *)0x400000, 1};
	return process_vm_readv(outside, &local, 1, &remote, 1, 0) < 0 ? -1 : 0;
}
static int do_kill_all(void) { return kill(-1, 0); } /* all of pid 1's namespace but us and it: nothing */

/* The kernel */
static int do_add_key(void) { return syscall(SYS_add_key, "user", "afs", "x", 1, -2 /* process keyring */); }
static int do_keyctl(void) { return syscall(SYS_keyctl, 0 /* KEYCTL_GET_KEYRING_ID */, -4 /* user keyring */, 0); }
static int do_bpf(void) { char attributes[64] = {0}; return syscall(SYS_bpf, 0, attributes, sizeof attributes); }
static int do_perf(void) { unsigned of[32] = {1, sizeof of}; return syscall(SYS_perf_event_open, of, -1, 0, -1, 0); }
static int do_kexec(void) { return syscall(SYS_kexec_load, 0, 0, NULL, ~0L); }
static int do_init_module(void) { return syscall(SYS_init_module, NULL, 0, ""); }
static int do_finit_module(void) { return syscall(SYS_finit_module, -1, "", 0); }
static int do_delete_module(void) { return syscall(SYS_delete_module, "afs_there_is_none", O_NONBLOCK); }
static int do_reboot(void) { return syscall(SYS_reboot, 0xfee1dead, 672274793, 0 /* CMD_CAD_OFF */, NULL); }
static int do_clock(void) { struct timespec none = {0, -1}; return syscall(SYS_clock_settime, CLOCK_REALTIME, &none); }
static int do_adjtimex(void)
{
	struct timex time = {0};
	if (adjtimex(&time) < 0)
		return -1;
	time.modes = ADJ_TICK; /* the tick that it has */
	return adjtimex(&time) < 0 ? -1 : 0;
}
static int do_personality(void) { return syscall(SYS_personality, 0x0040000 /* ADDR_NO_RANDOMIZE */); }
static int do_userfaultfd(void) { return syscall(SYS_userfaultfd, 0); }
static int do_io_uring(void) { char parameters[256] = {0}; return syscall(SYS_io_uring_setup, 1, parameters); }
static int do_syslog(void) { char text[64]; return syscall(SYS_syslog, 3, text, sizeof text); }
static int do_swapon(void) { return syscall(SYS_swapon, "/none", 0); }
static int do_swapoff(void) { return syscall(SYS_swapoff, "/none"); }
static int do_acct(void) { return syscall(SYS_acct, "/none"); }
static int do_quotactl(void) { return syscall(SYS_quotactl, 0, "/none", 0, NULL); }
static int do_fanotify(void) { return syscall(SYS_fanotify_init, 0x4 /* CLASS_CONTENT */, 0); }
static int do_hostname(void) { char name[65]; gethostname(name, sizeof name); return sethostname(name, strlen(name)); }

/* Rights and limits */
static int do_capabilities(void)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{~0u, ~0u, 0}, {~0u, ~0u, 0}};
	return syscall(SYS_capset, &head, data);
}
static int do_bounding(void) { return prctl(PR_CAPBSET_READ, CAP_SYS_ADMIN, 0, 0, 0) == 1 ? 0 : refuse(EPERM); }
static int do_new_privileges(void) { return prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0); }
static int do_no_seccomp(void) { return prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 0 ? 0 : refuse(EPERM); }
static int do_files(void)
{
	struct rlimit limit;
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_max += 1;
	return setrlimit(RLIMIT_NOFILE, &limit);
}
static int do_priority(void) { return setpriority(PRIO_PROCESS, 0, -5); }
static int do_realtime(void) { struct sched_param first = {1}; return sched_setscheduler(0, SCHED_FIFO, &first); }
static int do_oom_score(void) { return write(open("/proc/self/oom_score_adj", O_WRONLY), "-1000", 5) < 0 ? -1 : 0; }

/* Networks */
static int do_vsock(void) { return socket(40 /* AF_VSOCK */, SOCK_STREAM, 0) < 0 ? -1 : 0; }
static int do_abstract(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	strncpy(address.sun_path + 1, abstract, sizeof address.sun_path - 2);
	return connect(fd, (struct sockaddr *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(abstract));
}
static int do_interface(void)
{
	struct ifreq request = {.ifr_name = "lo"};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (ioctl(fd, SIOCGIFFLAGS, &request))
		return -1;
	return ioctl(fd, SIOCSIFFLAGS, &request); /* the flags that it has */
}

/* Files of the kernel: any that can be opened for writing is a way out. */
static int writable_below(const char *top, int depth)
{
	DIR *list = opendir(top);
	struct dirent *entry;
	int found = -1;
	if (list == NULL || depth == 0)
		return -1;
	while ((entry = readdir(list)) != NULL) {
		char path[4096];
		snprintf(path, sizeof path, "%s/%s", top, entry->d_name);
		if (entry->d_name[0] == '.' || entry->d_type == DT_LNK)
			continue;
		if (entry->d_type == DT_DIR) {
			int is_process = strcmp(top, "/proc") == 0 && atoi(entry->d_name);
			if (!is_process && writable_below(path, depth - 1) == 0)
				found = 0;
		} else if (entry->d_type == DT_REG) {
			struct stat status;
			/* Root may open what nobody can write; what is hidden is /dev/null. */
			if (stat(path, &status) || !S_ISREG(status.st_mode) || !(status.st_mode & 0222))
				continue;
			int fd = open(path, O_WRONLY | O_NONBLOCK);
			if (fd >= 0) {
				fprintf(stderr, "%s can be written\n", path);
				close(fd);
				found = 0;
			}
		}
	}
	closedir(list);
	return found;
}
static int do_proc_sys(void) { return writable_below("/proc/sys", 12) ? refuse(EROFS) : 0; }
static int do_proc(void) { return writable_below("/proc", 4) ? refuse(EROFS) : 0; }
static int do_sys(void) { return writable_below("/sys", 5) ? refuse(EROFS) : 0; }
static int do_sysrq(void) { return open("/proc/sysrq-trigger", O_WRONLY); }
static int do_core_pattern(void) { return open("/proc/sys/kernel/core_pattern", O_WRONLY); }
static int do_cgroup(void) { return mkdir("/sys/fs/cgroup/afs-escape", 0700); }
static int reads(const char *path)
{
	char byte;
	int fd = open(path, O_RDONLY | O_NONBLOCK);
	return fd < 0 ? -1 : read(fd, &byte, 1) == 1 ? 0 : refuse(ENODATA);
}
static int do_kcore(void) { return reads("/proc/kcore"); }
static int do_keys(void) { return reads("/proc/keys"); }
static int do_timers(void) { return reads("/proc/timer_list"); }
static int do_interrupts(void) { return reads("/proc/interrupts"); }
static int do_firmware(void)
{
	DIR *list = opendir("/sys/firmware");
	struct dirent *entry;
	while (list != NULL && (entry = readdir(list)) != NULL)
		if (entry->d_name[0] != '.')
			return 0;
	return refuse(ENODATA);
}

#define ATTEMPT(name) {#name, do_##name}
static const struct { const char *name; int (*attempt)(void); } attempts[] = {
	ATTEMPT(mount), ATTEMPT(mount_cgroup), ATTEMPT(bind), ATTEMPT(remount), ATTEMPT(umount), ATTEMPT(pivot_root),
	ATTEMPT(fsopen), ATTEMPT(open_tree), ATTEMPT(unshare_user), ATTEMPT(unshare_mount), ATTEMPT(clone_user),
	ATTEMPT(clone_mount), ATTEMPT(clone3_user), ATTEMPT(setns), ATTEMPT(unshare_user_i386), ATTEMPT(unshare_user_x32),
	ATTEMPT(handle), ATTEMPT(chroot), ATTEMPT(proc_root), ATTEMPT(descriptors),
	ATTEMPT(disk), ATTEMPT(disk_in_dev), ATTEMPT(memory), ATTEMPT(kmsg), ATTEMPT(fuse), ATTEMPT(loop), ATTEMPT(tun),
	ATTEMPT(kill), ATTEMPT(ptrace), ATTEMPT(pidfd), ATTEMPT(read_memory), ATTEMPT(kill_all),
	ATTEMPT(add_key), ATTEMPT(keyctl), ATTEMPT(bpf), ATTEMPT(perf), ATTEMPT(kexec), ATTEMPT(init_module),
	ATTEMPT(finit_module), ATTEMPT(delete_module), ATTEMPT(reboot), ATTEMPT(clock), ATTEMPT(adjtimex), ATTEMPT(iopl),
	ATTEMPT(ioperm), ATTEMPT(personality), ATTEMPT(userfaultfd), ATTEMPT(io_uring), ATTEMPT(syslog), ATTEMPT(swapon),
	ATTEMPT(swapoff), ATTEMPT(acct), ATTEMPT(quotactl), ATTEMPT(fanotify), ATTEMPT(hostname),
	ATTEMPT(capabilities), ATTEMPT(bounding), ATTEMPT(new_privileges), ATTEMPT(no_seccomp), ATTEMPT(files),
	ATTEMPT(priority), ATTEMPT(realtime), ATTEMPT(oom_score),
	ATTEMPT(vsock), ATTEMPT(abstract), ATTEMPT(interface),
	ATTEMPT(proc_sys), ATTEMPT(proc), ATTEMPT(sys), ATTEMPT(sysrq), ATTEMPT(core_pattern), ATTEMPT(cgroup),
	ATTEMPT(kcore), ATTEMPT(keys), ATTEMPT(timers), ATTEMPT(interrupts), ATTEMPT(firmware),
};

static int forks(void)
{
	int count = 0;
	pid_t child;
	while (count < 1000000 && (child = fork()) >= 0) {
		if (child == 0)
			pause();
		count++;
	}
	printf("%d %s\n", count, strerrorname_np(errno));
	return 0; /* as pid 1: all children end with it */
}

static int files(void)
{
	int count = 0;
	struct rlimit limit;
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	while (count < 10000000 && open("/", O_PATH) >= 0)
		count++;
	printf("%d %s\n", count, strerrorname_np(errno));
	return 0;
}

static int rights(void)
{
	const char *kinds[] = {"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"};
	printf("uid %d\neuid %d\n", getuid(), geteuid());
	for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		char path[64], target[64] = "";
		snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
		if (readlink(path, target, sizeof target - 1) < 0)
			return 1;
		printf("%s %s\n", kinds[i], target);
	}
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 2)
		return strcmp(argv[1], "rights") == 0 ? rights() : strcmp(argv[1], "forks") == 0 ? forks() : files();
	if (argc < 6)
		return 2;
	outside = atoi(argv[1]);
	marker = argv[2];
	disk = makedev(atoi(argv[3]), atoi(argv[4]));
	abstract = argv[5];
	for (unsigned i = 0; i < sizeof attempts / sizeof *attempts; i++) {
		int status;
		fflush(NULL);
		/* A child for each: some cannot be taken back. */
		pid_t child = fork();
		if (child == 0) {
			int result = attempts[i].attempt();
			printf("%s %s\n", attempts[i].name, result >= 0 ? "ok" : strerrorname_np(errno));
			fflush(NULL);
			_exit(0);
		}
		if (child < 0 || waitpid(child, &status, 0) != child)
			return 1;
		if (WIFSIGNALED(status))
			printf("%s SIG%s\n", attempts[i].name, sigabbrev_np(WTERMSIG(status)));
	}
	return 0;
}
