#!/bin/sh
# Unpacks Debian's package `prometheus` into the folder $1, for tests: nothing is installed, no
# service is started. Does nothing where it is there already or where there is no apt-get.
set -eu
folder=$1
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then exit 0; fi
if [ -x "$folder/bin/promtool" ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  echo "no apt-get: tests that need Prometheus are skipped unless it is on PATH" >&2
  exit 0
fi
if [ "$(id -u)" = 0 ]; then apt-get update -qq; fi
rm -rf "$folder" && mkdir -p "$folder/package"
( cd "$folder/package" && apt-get download -qq prometheus )
dpkg-deb --extract "$folder"/package/prometheus_*.deb "$folder/package"
mv "$folder/package/usr/bin" "$folder/bin"
rm -rf "$folder/package"
