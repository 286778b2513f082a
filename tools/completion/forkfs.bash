# bash completion for forkfs(1).
#
# Names come from listing directories of the mount and from nothing else: no file of it is opened, so that pressing
# Tab never takes a branch and never stops a VM.

_forkfs_mount() {
	local i
	for ((i = 1; i < COMP_CWORD; i++)); do
		if [[ ${COMP_WORDS[i]} == --mount ]]; then
			# bash splits --mount=DIR at the equals sign
			[[ ${COMP_WORDS[i + 1]} == = ]] && ((i++))
			printf '%s\n' "${COMP_WORDS[i + 1]}"
			return
		fi
	done
	printf '%s\n' "${FORKFS:-/forkfs}"
}

# The names in a directory, one a line, each after $2. Only what a sandbox or branch can be called: compgen -W would
# run a command substitution in a word of its list.
_forkfs_names() {
	local name
	command ls -1U -- "$1" 2>/dev/null | while IFS= read -r name; do
		[[ $name =~ ^[A-Za-z0-9._:-]+$ ]] && printf '%s%s\n' "$2" "$name"
	done
}

_forkfs_sandboxes() {
	mapfile -t COMPREPLY < <(compgen -W "$(_forkfs_names "$(_forkfs_mount)" '')" -- "$1")
}

# NAME/BRANCH: sandboxes first, the branches of one once its slash is there.
_forkfs_branches() {
	local sandbox
	if [[ $1 == */* ]]; then
		sandbox=${1%%/*}
		mapfile -t COMPREPLY < <(compgen -W "$(_forkfs_names "$(_forkfs_mount)/$sandbox/branches" "$sandbox/")" -- "$1")
	else
		_forkfs_sandboxes "$1"
		COMPREPLY=("${COMPREPLY[@]/%//}")
		compopt -o nospace
	fi
}

# NAME/BRANCH, or NAME/BRANCH/FORK when there is a second slash
_forkfs_forks() {
	if [[ $1 == */*/* ]]; then
		local branch=${1%/*}
		mapfile -t COMPREPLY < <(compgen -W "$(_forkfs_names "$(_forkfs_mount)/${branch%%/*}/branches/${branch#*/}/forks" "$branch/")" -- "$1")
	else
		_forkfs_branches "$1"
	fi
}

_forkfs() {
	local commands='mount umount attach detach ls status branch fork wait rm restore exec health pool doctor version help'
	local current=$2 previous=$3 command='' words=0 i options=''

	COMPREPLY=()
	for ((i = 1; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		--mount | --pid | --qemu | --firecracker | --coop | --disk | --owner | --store | --key | -o | -n | --attach | --vmm | --jailer | --conf | --dir | --socket | --min | --max | --ttl | --mailbox | --timeout | --ack | --forks | --each)
			[[ ${COMP_WORDS[i + 1]} == = ]] && ((i++))
			((i++))
			;;
		-*) ;;
		*) if [[ -z $command ]]; then command=${COMP_WORDS[i]}; else ((words++)); fi ;;
		esac
	done
	[[ $previous == = ]] && previous=${COMP_WORDS[COMP_CWORD - 2]}
	[[ $current == = ]] && current=''

	case $previous in
	--mount)
		mapfile -t COMPREPLY < <(compgen -d -- "$current")
		return
		;;
	--qemu | --firecracker | --coop)
		mapfile -t COMPREPLY < <(compgen -f -- "$current")
		return
		;;
	--pid)
		mapfile -t COMPREPLY < <(compgen -W "$(pgrep -f '^[^ ]*qemu-system' 2>/dev/null)" -- "$current")
		return
		;;
	--store)
		mapfile -t COMPREPLY < <(compgen -W 'memory dense packed' -- "$current")
		return
		;;
	-o)
		[[ $command == mount ]] || return
		mapfile -t COMPREPLY < <(compgen -W 'allow_other branch=off branch-rate= lease= memory= captures= cache-age= cache-size= cache-store= passthrough=off reattach=off store= default-store= ack-address=' -- "$current")
		compopt -o nospace
		return
		;;
	--vmm | --jailer | --conf | --dir | --socket | --forks | --each)
		mapfile -t COMPREPLY < <(compgen -f -- "$current")
		return
		;;
	--disk | --owner | --key | --attach | -n | --min | --max | --ttl | --mailbox | --timeout | --ack) return ;;
	esac

	if [[ $current == -* ]]; then
		case $command in
		'') options='--mount --help --version' ;;
		mount) options='-f -o --help' ;;
		umount) options='--help' ;;
		attach) options='--pid --qemu --firecracker --coop --disk --track --force --owner --json --mount --help' ;;
		ls | status) options='--json --mount --help' ;;
		branch) options='--live --diff --full --no-wait --max-rate --force --store --key --json --mount --help' ;;
		fork) options='--mailbox --each --ack --json --mount --help' ;;
		detach | wait | rm | verify | export) options='--mount --help' ;;
		import) options='--store --store-dir --mount --help' ;;
		convert) options='--to --mount --help' ;;
		inspect) options='--chunks --mount --help' ;;
		restore) options='-n --forks --attach --track --paused --healthy --ready-timeout --accept-torn --trust --as-served --show --vmm --jailer --conf --dir --backend --no-prefetch --drive --net --ack --no-ack --ack-address --mount --help' ;;
		pool) options='--socket --min --max --ttl --end-all --mailbox --ack --no-ack --timeout --main --env --log --vmm --conf --dir --backend --drive --net --ack-address --healthy --ready-timeout --accept-torn --trust --as-served --mount --help' ;;
		exec) options='--stdin --tty --env --cwd --main --log --detach --exit-file --socket --ready-timeout --mount --help' ;;
		health) options='--socket --wait --json --mount --help' ;;
		pager) options='--children --owner --all --no-prefetch --limit --working-set --with-parent --mount --help' ;;
		doctor) options='--json --help' ;;
		esac
		mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
		return
	fi

	case $command in
	'') mapfile -t COMPREPLY < <(compgen -W "$commands" -- "$current") ;;
	help) ((words == 0)) && mapfile -t COMPREPLY < <(compgen -W "$commands" -- "$current") ;;
	mount | umount) ((words == 0)) && mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
	detach | ls | branch | exec | health) ((words == 0)) && _forkfs_sandboxes "$current" ;;
	export | convert | inspect | pager)
		if ((words == 0)); then
			_forkfs_branches "$current"
		else
			mapfile -t COMPREPLY < <(compgen -f -- "$current")
		fi
		;;
	import)
		if ((words == 0)); then
			mapfile -t COMPREPLY < <(compgen -f -- "$current")
		else
			_forkfs_branches "$current"
		fi
		;;
	status)
		((words == 0)) && _forkfs_branches "$current"
		;;
	restore)
		((words == 0)) && _forkfs_forks "$current"
		;;
	pool)
		if ((words == 0)); then
			mapfile -t COMPREPLY < <(compgen -W 'serve acquire release status drain' -- "$current")
		elif [[ " ${COMP_WORDS[*]} " == *' serve '* ]]; then
			_forkfs_forks "$current"
		fi
		;;
	fork) ((words == 0)) && _forkfs_branches "$current" ;;
	wait | rm | verify) _forkfs_branches "$current" ;;
	esac
	# names may have colons, at which bash breaks words
	declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "$current"
	return 0
}

complete -F _forkfs forkfs
