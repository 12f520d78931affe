#!/bin/sh
# Verifies a bundle: who signed it, and that it holds exactly what was signed. Changes nothing, opens no connection.
#   sh verify.sh FINGERPRINT [FOLDER]
# FINGERPRINT is the SHA-256 of the vendor's public key in DER form; take it from another source than the bundle.
# Exit status: 0 sound, 2 usage, 3 a program is missing, 5 refused.
set -eu
LC_ALL=C
export LC_ALL

say() { printf '%s\n' "$*" >&2; }
refuse() {
  say "error: $1"
  say "hint: ${2:-get the bundle again, from the vendor}"
  exit 5
}

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  say "usage: sh verify.sh FINGERPRINT [FOLDER]"
  exit 2
fi
fingerprint=$(printf '%s' "$1" | tr -d ': ' | tr 'A-F' 'a-f')
cd "${2:-$(dirname "$0")/..}"
for program in openssl sha256sum find sort cmp sed comm grep mktemp; do
  if ! command -v "$program" >/dev/null 2>&1; then
    say "error: \`$program\` is not there"
    say "hint: install it; nothing was verified"
    exit 3
  fi
done

# Before any file is read: nothing but plain files and folders, none for others to change.
if [ -n "$(find . ! -type f ! -type d -print | head -n 1)" ]; then
  refuse "the bundle holds a link, a device or a pipe"
fi
if [ -n "$(find . \( -perm -4000 -o -perm -2000 -o -perm -0002 \) -print | head -n 1)" ]; then
  refuse "a file of the bundle is set-user, set-group or writable by all"
fi
for name in SHA256SUMS SHA256SUMS.sig keys/vendor.pub; do
  [ -f "$name" ] || refuse "\`$name\` is missing"
done

found=$(openssl pkey -pubin -in keys/vendor.pub -outform DER 2>/dev/null | sha256sum | cut -c1-64)
if [ "$found" != "$fingerprint" ]; then
  refuse "the bundle's key has the fingerprint $found" "who gave you this bundle, and the fingerprint?"
fi
if ! openssl pkeyutl -verify -rawin -pubin -inkey keys/vendor.pub -sigfile SHA256SUMS.sig -in SHA256SUMS \
  >/dev/null 2>&1; then
  if ! openssl pkeyutl -help 2>&1 | grep -q -e '-rawin'; then
    say "error: this openssl is too old to check an Ed25519 signature"
    say "hint: openssl 3.0 or newer is needed; nothing was verified"
    exit 3
  fi
  refuse "the signature of \`SHA256SUMS\` does not hold"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if grep -q -v -E '^[0-9a-f]{64}  [A-Za-z0-9._][A-Za-z0-9._/-]*$' SHA256SUMS || grep -q -F '..' SHA256SUMS; then
  refuse "\`SHA256SUMS\` holds a line that is none"
fi
{
  sed 's/^[0-9a-f]*  //' SHA256SUMS
  printf '%s\n' SHA256SUMS SHA256SUMS.sig
} | sort >"$work/signed"
find . -type f -print | sed 's,^\./,,' | sort >"$work/there"
missing=$(comm -23 "$work/signed" "$work/there" | head -n 1)
[ -z "$missing" ] || refuse "\`$missing\` is missing"
if ! cmp -s "$work/signed" "$work/there"; then
  refuse "a file is there that was not signed: $(comm -13 "$work/signed" "$work/there" | head -n 1)" \
    "remove it, and ask who put it there"
fi
if ! sha256sum --check --strict --quiet SHA256SUMS >"$work/said" 2>&1; then
  refuse "$(sed -n 's/^\(.*\): FAILED.*/\1/p' "$work/said" | head -n 1) is not what was signed"
fi
say "sound: $(wc -l <SHA256SUMS | tr -d ' ') files, signed by $fingerprint"
