# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Sourced by the scripts beside it.

# give_up TEXT: say in one line why this ends, and end.
give_up() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -- "$@"; fi; }

# install_packages NAME...: with the distribution's own tool. Says what it installs first.
install_packages() {
    echo "Installing system packages: $*"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null ||
            give_up "only root can install $*, and there is no sudo; install them as root, then run this again"
        sudo -- true ||
            give_up "only root can install $*, and sudo does not let $(id -un) do it; install them as root, then run this again"
    fi
    if command -v apt-get >/dev/null; then
        apt_install "$@"
    elif command -v dnf >/dev/null; then
        as_root dnf --quiet install -y --setopt=install_weak_deps=False "$@" ||
            give_up "dnf could not install $*; its messages are above"
    else
        give_up "there is neither apt-get nor dnf; install $* by hand, then run this again"
    fi
}

apt_install() {
    local log updated=yes
    log=$(mktemp)
    # shellcheck disable=SC2064  # the file of now
    trap "rm -f '$log'" RETURN EXIT
    # That a list could not be fetched is an error only where a package is missed for it.
    as_root apt-get -qq -o APT::Update::Error-Mode=any update >"$log" 2>&1 || updated=no
    if ! as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        [ "$updated" = yes ] || give_up "the package lists could not be fetched, so $* cannot be installed: is there a network?"
        give_up "apt-get could not install $*; its messages are above"
    fi
}
