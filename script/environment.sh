# Sourced by quickstart.sh and test.sh.

# make_environment FOLDER REQUIREMENTS: activates the virtual environment in FOLDER, made on first use, with the
# requirements installed. Installs again only when a requirement file changed.
make_environment() {
  local folder=$1 requirements=$2 stamp
  if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("${PYTHON:-python3}" --version) found, Python 3.10 or newer needed: set PYTHON=/path/to/python3" >&2
    exit 2
  fi
  [ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
  source "$folder/bin/activate"
  install_requirements "$requirements"
}

# install_requirements REQUIREMENTS: into the active environment, unless they were installed already as they are now.
install_requirements() {
  local stamp
  stamp=$(cat requirements*.txt | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  local mark="$VIRTUAL_ENV/.installed-$1-$stamp"
  if [ ! -e "$mark" ]; then
    echo "installing $1 into $VIRTUAL_ENV (torch is large: a minute or two)"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    touch "$mark"
  fi
}
