# banger. `make demo` shows it, `make test` proves it.

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X banger/internal/cli.Version=$(VERSION) -X banger/internal/daemon.Version=$(VERSION) -X banger/internal/guest.Version=$(VERSION)
PROGRAMS := banger bangerd banger-vsock-agent

# Host packages (Debian's names), each with its reason in the README.
RUN_PACKAGES  := qemu-system-x86 mmdebstrap uidmap ca-certificates
TEST_PACKAGES := $(RUN_PACKAGES) e2fsprogs fsverity xfsprogs btrfs-progs gcc libc6-dev docker-registry busybox-static zstd cpio kmod attr acl libcap2-bin procps bsdutils iproute2 iputils-ping curl strace
BENCH_PACKAGES := $(TEST_PACKAGES) passt

.PHONY: build demo test check fuzz bench soak packages test-packages clean

build: ## the three programs, in bin/
	@for p in $(PROGRAMS); do CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$$p ./cmd/$$p || exit 1; done

demo: packages build ## build, install what is needed when root, run a VM
	@./bin/banger run apt:bookworm -- sh -c 'uname -a; cat /etc/os-release; id; df -h / /root'

test: test-packages check ## everything, with guests booted
	./hack/test

check: ## what needs no guest: formatting, vet, import rules
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "run gofmt -w on these"; exit 1; }
	$(GO) vet ./...
	$(GO) test -run 'TestImports|TestAgent' .

fuzz: ## every fuzz target, minutes each
	./hack/fuzz 500000 ./...

bench: build ## ours beside the rivals, in one run
	@./hack/packages $(BENCH_PACKAGES)
	./hack/bench

soak: test-packages ## long counts of the random tests
	./hack/test -soak

packages:
	@./hack/packages $(RUN_PACKAGES)

test-packages:
	@./hack/packages $(TEST_PACKAGES)

clean:
	rm -rf bin
