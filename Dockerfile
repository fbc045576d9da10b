# The image has its own Node, so the packages that bring one (optional) are left out, and so is all that is only for
# development, the embedded PostgreSQL among it. Nothing is built: Node runs the TypeScript sources as they are.

FROM node:24.21.0-slim AS packages
WORKDIR /broker
COPY package.json package-lock.json .npmrc ./
RUN npm ci --omit=dev --omit=optional --ignore-scripts

FROM node:24.21.0-slim
WORKDIR /broker
COPY --from=packages /broker/node_modules ./node_modules
COPY package.json openapi.yaml ./
COPY migrations ./migrations
COPY src ./src

# The only place that is written to: everything else may be mounted read-only.
ENV SPOOL_DIR=/var/lib/broker/spool
RUN mkdir -p /var/lib/broker/spool && chown -R 1000:1000 /var/lib/broker && chmod 0700 /var/lib/broker/spool
VOLUME /var/lib/broker/spool

# The sources without their types, compiled: the process starts faster, and needs no compiler in its memory.
ENV NODE_COMPILE_CACHE=/broker/.compile-cache
RUN mkdir .compile-cache && chown 1000:1000 .compile-cache

# By number, so that Kubernetes can tell that it is not root; it is the user `node` of the base image.
USER 1000:1000
RUN node --max-semi-space-size=8 --heap-growing-percent=30 src/main.ts openapi > /dev/null

# Public and internal listener.
EXPOSE 3000 3001
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["node", "-e", "fetch(`http://127.0.0.1:${process.env.INTERNAL_PORT ?? 3001}/livez`).then(({ ok }) => process.exit(ok ? 0 : 1), () => process.exit(1))"]

# The young generation stays small, and what buffers of a socket's size have freed is used again: with glibc's own limits,
# or lower ones, it goes back to the system and comes again page by page, which costs more than what is passed on in it.
ENV MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=67108864 MALLOC_MMAP_THRESHOLD_=131072

# SIGTERM drains; see "Operating it" in README.md for how long that may take.
STOPSIGNAL SIGTERM
ENTRYPOINT ["node", "--max-semi-space-size=8", "--heap-growing-percent=30", "src/main.ts"]
CMD ["serve"]
