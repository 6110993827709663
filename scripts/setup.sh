# Sourced by the other scripts: puts what they need into .venv, says so, and does nothing the second time.
# What has to come from the system (venv for Python, openssl, haproxy) is installed with apt-get by root; others are told.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# need_package COMMAND... PACKAGE: make sure that a command succeeds, if necessary by installing a Debian package.
need_package() {
    local package="${*: -1}"
    local check=("${@:1:$#-1}")
    "${check[@]}" >/dev/null 2>&1 && return
    [ "$(id -u)" = 0 ] || fail "this needs the Debian package $package; as root: apt-get install $package"
    say "Installing $package (apt-get) …"
    if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } >/tmp/dialog-apt.log 2>&1; then
        cat /tmp/dialog-apt.log >&2
        fail "apt-get could not install $package"
    fi
}

python=""
for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || fail "this needs Python 3.11 or newer, as python3 on the PATH"

# install EXTRAS: have the project and these extras in .venv, editable.
install() {
    local stamp=".venv/.installed-${1//,/-}" wanted
    wanted="$(cksum <pyproject.toml) $PWD"
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    need_package "$python" -c 'import ensurepip, venv' "$(basename "$python")-venv"
    say "Installing Dialog and what it needs into .venv (once; about a minute) …"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check -e ".[$1]"
    echo "$wanted" >"$stamp"
}
