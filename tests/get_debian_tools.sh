#!/bin/sh
# Unpacks Prometheus and nginx from Debian's packages into the folder $1/bin, for tests: nothing is
# installed, no service is started. Does nothing where they are there already, or without apt-get.
set -eu
folder=$1
missing=
for name in prometheus promtool nginx; do
  command -v $name >/dev/null || [ -x "$folder/bin/$name" ] || missing=yes
done
if [ -z "$missing" ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  echo "no apt-get: tests that need Prometheus or nginx are skipped unless they are on PATH" >&2
  exit 0
fi
if [ "$(id -u)" = 0 ]; then apt-get update -qq; fi
rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/packages"
( cd "$folder/packages" && apt-get download -qq prometheus nginx )
for package in "$folder"/packages/*.deb; do dpkg-deb --extract "$package" "$folder/packages"; done
mv "$folder"/packages/usr/bin/* "$folder"/packages/usr/sbin/* "$folder/bin/"
rm -rf "$folder/packages"
