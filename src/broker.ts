// The composition root: every part made once, in the order of need, and taken down in the reverse. Nothing here decides
// anything; `main.ts` reads the settings and listens to signals.

import { randomUUID } from 'node:crypto'
import { createAccessTokens } from './access-token.ts'
import { createAntiEntropy } from './anti-entropy.ts'
import { createAudit } from './audit.ts'
import type { AuditDetails } from './audit-event.ts'
import { createAuditedLog } from './audited-log.ts'
import { expireEvents, noteHeads } from './audit-upkeep.ts'
import { createCallers } from './callers.ts'
import { systemClock } from './clock.ts'
import type { Config, ListenerSettings } from './config.ts'
import { createHeartbeat } from './failover.ts'
import { createForwarder } from './forward.ts'
import type { App } from './http/app.ts'
import { buildInternalApp } from './http/internal-app.ts'
import { type Check, runChecks, sharedCheck } from './http/health-routes.ts'
import { watchOverload } from './http/overload.ts'
import { buildPublicApp } from './http/public-app.ts'
import { createMetrics } from './metrics.ts'
import { createAuthorizationServer } from './pagero.ts'
import { startPeriodic } from './periodic.ts'
import type { Clock, Log, Ports } from './ports.ts'
import { createAttemptStore } from './postgres/attempt-store.ts'
import { createAuditStore } from './postgres/audit-store.ts'
import { createCensus } from './postgres/census.ts'
import { createConnectLinkStore } from './postgres/connect-link-store.ts'
import { createCredentialUseStore } from './postgres/credential-use-store.ts'
import { SWEEP_ROWS_MAX } from './postgres/database.ts'
import { claimDatabase, findUnsafeSettings, readDeploymentId } from './postgres/deployment.ts'
import { createGrantStore } from './postgres/grant-store.ts'
import { createImportStore } from './postgres/import-store.ts'
import { createLoginTransactionStore } from './postgres/login-transaction-store.ts'
import { readSchemaState } from './postgres/migrate.ts'
import { createOutboxStore } from './postgres/outbox-store.ts'
import { createPendingGrantStore } from './postgres/pending-grant-store.ts'
import { createReplicaStore } from './postgres/replica-store.ts'
import { createRevocationStore } from './postgres/revocation-store.ts'
import { createSessionStore } from './postgres/session-store.ts'
import { createSessionTicketStore } from './postgres/session-ticket-store.ts'
import { createImporter } from './import.ts'
import { createKeepAlive } from './keep-alive.ts'
import { findUnusableKeys, openReadyDatabase } from './ready-database.ts'
import { createRecovery } from './recovery.ts'
import { createRefresher } from './refresh.ts'
import { createRevoker } from './revocation.ts'
import { createChainKeys, createSealer } from './seal.ts'
import { createSpool } from './spool.ts'
import type { Tracing } from './tracing.ts'
import { createUpstreamLookup } from './upstream-address.ts'
import { sweepAll, warnOfExpiry } from './upkeep.ts'
import { createWebhookSender } from './webhook.ts'

/** Nothing is refreshed on a new database server before a heartbeat has met it. */
const HEARTBEAT_RETRY_SECONDS = 1
/** Ended sessions and logins that nobody finished are cleared away this often. */
const SWEEP_SECONDS = 60
/** Warnings are of days. */
const EXPIRY_WARNING_SECONDS = 3_600
/** How late the cut end of a chain is missed at most; one row an hour. */
const HEADS_SECONDS = 3_600
/** The retention is of days; each round leaves a row for each chain that it cuts. */
const AUDIT_RETENTION_SECONDS = 6 * 3_600
/** A round of keep-alive is a query that finds nothing, nearly always. */
const KEEP_ALIVE_SECONDS = 60
/** Names the broker in Via and Proxy-Status: the same on every replica, no version, no host. */
const VIA_PSEUDONYM = 'pagero-token-broker'

export interface Broker {
  /** Ports that the listeners got; those of the settings, unless these were 0. */
  publicPort: number
  internalPort: number
  /**
   * Stops without losing anything: unready at once, listening for a while longer so that a balancer can move on, every
   * accepted request answered, every rotation stored or spooled. Calling it again changes nothing.
   */
  stop(): Promise<void>
  /** The trace that the running code belongs to: for the log. */
  traceId(): string | undefined
}

export interface BrokerOptions {
  log: Log
  /** Lines of the log that nobody has read in time, so far. */
  logLinesDropped?: () => number
  /** Further routes of the public listener: the demonstration's page. */
  publicRoutes?: (app: App) => void | Promise<void>
  /** Puts something between the core and the outside world: a crash point of a test. */
  wrapPorts?: (ports: Ports) => Ports
}

/**
 * Starts a broker with both listeners.
 * @throws Error with a sentence for the operator when the schema does not fit or a port is taken
 */
export async function startBroker(config: Config, options: BrokerOptions): Promise<Broker> {
  const { publicRoutes, wrapPorts = (ports) => ports, logLinesDropped = () => 0 } = options
  const clock = systemClock
  const metrics = createMetrics({ clock, log: options.log })
  const { log } = metrics
  const identity = { replica: config.replicaName, boot: randomUUID() }
  const closing: Array<() => Promise<unknown>> = []
  const closeAll = async () => {
    for (const close of closing.splice(0).toReversed()) await close()
  }
  try {
    const tracing = await startTracingOf(config, { clock, log })
    // What comes last: the ends of others are traced.
    closing.push(async () => tracing?.stop())
    const database = await openReadyDatabase(config, log, closing)
    const deploymentId = await readDeploymentId(database)
    const sealer = createSealer(config.encryptionKeys, deploymentId)
    const auditEvents = createAuditStore(database)
    const chainKeys = createChainKeys(config.encryptionKeys, deploymentId)
    const audit = createAudit({ clock, log, auditEvents }, chainKeys, identity)
    // Before the database alone: whatever ends after it may still have something to say.
    closing.push(async () => {
      audit.record({ action: 'broker_stopped', actor: 'broker' })
      await audit.close()
    })
    const lookup = createUpstreamLookup({ allowPrivate: config.allowPrivateUpstreams })
    const spool = await createSpool(config.spoolDir, log)
    const untraced: Ports = wrapPorts({
      clock,
      log: createAuditedLog(log, audit),
      audit: metrics.counted(audit),
      auditEvents,
      sealer,
      grants: createGrantStore(database, {
        refreshTokenLifetime: config.refreshTokenLifetime,
        heartbeatStaleSeconds: config.refresh.heartbeatStaleSeconds,
        databaseSettleSeconds: config.refresh.databaseSettleSeconds,
        zombieWaitSeconds: config.refresh.zombieWaitSeconds,
        events: config.webhooks !== undefined,
      }),
      attempts: createAttemptStore(database),
      imports: createImportStore(database, config),
      revocations: createRevocationStore(database.db),
      outbox: createOutboxStore(database),
      loginTransactions: createLoginTransactionStore(database.db),
      connectLinks: createConnectLinkStore(database.db),
      pendingGrants: createPendingGrantStore(database.db),
      sessionTickets: createSessionTicketStore(database.db),
      sessions: createSessionStore(database.db),
      replicas: createReplicaStore(database.db, config.refresh),
      credentialUses: createCredentialUseStore(database.db),
      authorizationServer: createAuthorizationServer(config.pagero, { clock, log, lookup }),
      spool,
    })
    const ports = tracing?.ports(untraced) ?? untraced
    // A copy, or a restored database: whoever else uses its tokens would lose them to us, or we to them.
    const held = (await claimDatabase(database)) === 'another'
    if (held) ports.log.error('database_not_accepted', { reason: 'run: broker accept-database' })
    const unsafe = await findUnsafeSettings(database)
    if (unsafe.length > 0) log.error('database_may_forget', { reason: `${unsafe.join(', ')} off` })
    const unusableKeys = await findUnusableKeys(database, ports)

    const callers = await createCallers(config.callersFile, ports)
    closing.push(async () => callers.close())
    const antiEntropy = createAntiEntropy(ports, config.refresh, identity)
    const refresher = createRefresher(
      ports,
      config.refresh,
      { ...identity, held },
      tracing?.aroundRefresh,
    )
    const recovery = createRecovery(ports, refresher, identity)
    // With a held one nothing is brought back: its spool may belong to the original. Nor does it say that it lives: those
    // that are not held would wait for it.
    const tellOfLife = held
      ? async () => void (await ports.replicas.now())
      : createHeartbeat(ports, { antiEntropy, refresher, recovery }, identity)
    let beatAtMs = clock.monotonicMs()
    const beat = async () => {
      await tellOfLife()
      beatAtMs = clock.monotonicMs()
    }
    await beat()
    const heartbeat = startPeriodic(ports, {
      intervalSeconds: config.refresh.heartbeatSeconds,
      retrySeconds: Math.min(HEARTBEAT_RETRY_SECONDS, config.refresh.heartbeatSeconds),
      event: 'heartbeat_failed',
      work: beat,
    })
    closing.push(() => heartbeat.stop())
    if (!held) antiEntropy.start()
    void antiEntropy.untilDrained.then(() => recovery.run())
    closing.push(() => recovery.stop())
    closing.push(() => antiEntropy.stop())
    const sweep = startPeriodic(ports, {
      intervalSeconds: SWEEP_SECONDS,
      event: 'sweep_failed',
      work: () =>
        sweepAll(SWEEP_ROWS_MAX, [
          () => ports.sessions.sweep(),
          () => ports.loginTransactions.sweep(),
          () => ports.connectLinks.sweep(),
          () => ports.pendingGrants.sweep(),
          () => ports.sessionTickets.sweep(),
          () => ports.imports.sweep(),
          () => ports.replicas.sweep(),
          () => ports.grants.sweep(),
          () => ports.outbox.sweep(),
        ]),
    })
    closing.push(() => sweep.stop())
    const headNotes = startPeriodic(ports, {
      intervalSeconds: HEADS_SECONDS,
      event: 'heads_not_noted',
      work: () => noteHeads(ports),
    })
    closing.push(() => headNotes.stop())
    const auditRetention = startPeriodic(ports, {
      intervalSeconds: AUDIT_RETENTION_SECONDS,
      event: 'audit_retention_failed',
      work: async (stopping) =>
        config.auditRetentionDays === 0
          ? 0
          : expireEvents(
              { audit, auditEvents, log },
              chainKeys,
              config.auditRetentionDays,
              stopping,
            ),
    })
    closing.push(() => auditRetention.stop())
    const revoker = createRevoker(ports)
    if (!held) revoker.start()
    closing.push(() => revoker.stop())
    const webhookSender =
      config.webhooks &&
      createWebhookSender(ports, { ...config.webhooks, publicUrl: config.publicUrl })
    if (!held) webhookSender?.start()
    closing.push(async () => webhookSender?.stop())
    closing.push(() => refresher.stop())
    const keepAlive = createKeepAlive(ports, refresher)
    const keepingAlive = startPeriodic(ports, {
      intervalSeconds: KEEP_ALIVE_SECONDS,
      event: 'keep_alive_failed',
      work: async (stopping) => (held ? 0 : keepAlive(stopping)),
    })
    closing.push(() => keepingAlive.stop())
    const warning = startPeriodic(ports, {
      intervalSeconds: EXPIRY_WARNING_SECONDS,
      event: 'expiry_warning_failed',
      work: (stopping) => warnOfExpiry({ ...ports, log }, stopping),
    })
    closing.push(() => warning.stop())
    const importer = createImporter(ports, refresher, {
      callerWaitSeconds: config.refresh.callerWaitSeconds,
      subjectClaim: config.subjectClaim,
    })
    const importing = startPeriodic(ports, {
      intervalSeconds: config.refresh.antiEntropySeconds,
      event: 'import_resume_failed',
      work: async (stopping) => (held ? 0 : importer.resume(stopping)),
    })
    closing.push(() => importing.stop())
    const accessTokens = createAccessTokens(ports, refresher, {
      ...config.refresh,
      publicUrl: config.publicUrl,
      tokenCacheTrustMs: config.tokenCacheTrustMs,
      staleLimitSeconds: config.staleLimitSeconds,
    })
    const untracedForwarder = createForwarder({
      ...config.proxy,
      apiUrl: config.pagero.apiUrl,
      viaPseudonym: VIA_PSEUDONYM,
      lookup,
    })
    const forwarder = tracing?.forwarder(untracedForwarder) ?? untracedForwarder
    closing.push(() => forwarder.close())

    const overload = watchOverload(ports, {
      delayMs: config.overloadDelayMs,
      statementsWaiting: () => database.pool.waitingCount,
    })
    closing.push(async () => overload.stop())
    let draining = false
    const checksOfEach: Record<string, Check> = {
      database: () =>
        beat().then(
          () => undefined,
          () => 'not writable',
        ),
      migrations: async () => {
        // A newer one is normal while an upgrade rolls through the replicas; only a start on it is refused.
        const state = await readSchemaState(database)
        return state === 'missing' ? 'missing' : undefined
      },
      deployment: async () =>
        held ? 'the database is a copy or was restored, and is not accepted yet' : undefined,
      durability: async () =>
        unsafe.length === 0 || config.allowUnsafeDatabase
          ? undefined
          : `commits may be forgotten: ${unsafe.join(', ')} off`,
      keys: async () => unusableKeys,
      spool: async () => {
        if (!antiEntropy.drained()) return 'not drained yet'
        return ports.spool.checkWritable().then(
          () => undefined,
          () => 'not writable',
        )
      },
      draining: async () => (draining ? 'shutting down' : undefined),
    }
    // Probes and scrapes ask for all of them, whenever they like and however many they are.
    const checks = Object.fromEntries(
      Object.entries(checksOfEach).map(([name, check]) => [name, sharedCheck(clock, check)]),
    )
    metrics.read({
      rotationsInFlight: () => refresher.inFlight(),
      grantsCached: () => accessTokens.cached(),
      spoolEntries: () => spool.size(),
      auditEventsWaiting: () => audit.waiting(),
      databaseConnections: () => ({
        total: database.pool.totalCount,
        idle: database.pool.idleCount,
        waiting: database.pool.waitingCount,
      }),
      requestsShed: () => overload.shed(),
      logLinesDropped,
      auditEventsDropped: () => audit.dropped(),
      secondsSinceHeartbeat: () => (clock.monotonicMs() - beatAtMs) / 1000,
      checks: () => runChecks(clock, checks),
      warnings: () => callers.warnings(),
      census: createCensus(database),
    })
    const publicApp = await buildPublicApp({
      ports,
      config,
      accessTokens,
      forwarder,
      revoker,
      overload,
      counts: metrics.requestsOf('public'),
      tracing,
      ...(publicRoutes === undefined ? {} : { routes: publicRoutes }),
    })
    const internalApp = await buildInternalApp({
      ports,
      callers,
      accessTokens,
      forwarder,
      importer,
      revoker,
      webhookSender,
      overload,
      metrics,
      counts: metrics.requestsOf('internal'),
      tracing,
      publicApp,
      settings: {
        publicUrl: config.publicUrl,
        allowedOrigins: config.allowedOrigins,
        redirectUri: config.pagero.redirectUri,
        requestTimeoutMs: config.proxy.totalTimeoutMs,
        answerIdleTimeoutMs: config.proxy.idleTimeoutMs,
        trustedProxies: config.trustedProxies,
        rateLimits: config.rateLimits,
      },
      checks,
    })
    // From here nobody is waiting for a token any more, so none is presented.
    closing.push(async () => void refresher.stop())
    closing.push(() => Promise.all([publicApp.close(), internalApp.close()]))
    const publicPort = await listen(publicApp, config.public)
    const internalPort = await listen(internalApp, config.internal)
    log.info('broker_started', { port: publicPort })
    audit.record({ action: 'broker_started', actor: 'broker', details: configurationOf(config) })
    if (config.pagero.pkce === 'off') {
      log.warn('pkce_is_off', {
        setting: 'PAGERO_PKCE',
        reason: 'Pagero recommends PKCE also with a client secret: set PAGERO_PKCE=S256',
      })
    }

    let stopped: Promise<void> | undefined
    return {
      publicPort,
      internalPort,
      stop() {
        stopped ??= (async () => {
          // Pauses do not keep the process alive; while it stops, something must.
          const awake = setInterval(() => undefined, 1_000)
          draining = true
          log.info('broker_stopping')
          // What nobody waits for presents no token from now on. Each is waited for below.
          for (const unasked of [keepingAlive, importing, recovery]) void unasked.stop()
          await clock.sleep(config.shutdownListenSeconds * 1000)
          await closeAll()
          clearInterval(awake)
          log.info('broker_stopped')
        })()
        return stopped
      },
      traceId: () => tracing?.traceId(),
    }
  } catch (error) {
    await closeAll()
    throw error
  }
}

/** Loads what traces only where it is wanted: it takes a dozen MiB. */
async function startTracingOf(
  { traces, pagero, replicaName: replica }: Config,
  ports: { clock: Clock; log: Log },
): Promise<Tracing | undefined> {
  if (traces === undefined) return undefined
  const { startTracing } = await import('./tracing.ts')
  return startTracing(traces, pagero, { ...ports, replica })
}

/** The settings that security rests on: none of them a secret, nor a text. */
function configurationOf(config: Config): AuditDetails {
  const { pagero } = config
  const isSet = (value: unknown): string => (value === undefined ? 'unset' : 'set')
  return {
    keyIds: config.encryptionKeys.map(({ keyId }) => keyId),
    settings: [
      `PAGERO_PKCE=${pagero.pkce}`,
      `PAGERO_CLIENT_AUTH=${pagero.clientAuth}`,
      `PAGERO_ISSUER ${isSet(pagero.issuer)}`,
      `PAGERO_JWKS_URL ${isSet(pagero.jwksUrl)}`,
      `PAGERO_CLIENT_SECRET_NEXT ${isSet(pagero.clientSecretNext)}`,
      `CALLERS_FILE ${isSet(config.callersFile)}`,
      `WEBHOOK_URL ${isSet(config.webhooks)}`,
      `ALLOWED_ORIGINS ${config.allowedOrigins.length}`,
      `TRUSTED_PROXIES ${config.trustedProxies.length}`,
      `ALLOW_PRIVATE_UPSTREAMS=${config.allowPrivateUpstreams}`,
      `ALLOW_UNSAFE_DATABASE=${config.allowUnsafeDatabase}`,
      `AUDIT_RETENTION_DAYS=${config.auditRetentionDays}`,
      `LOG_LEVEL=${config.logLevel}`,
    ],
  }
}

async function listen(app: App, { host, port }: ListenerSettings): Promise<number> {
  await app.listen({ host, port })
  const [address] = app.addresses()
  return typeof address === 'object' ? address.port : port
}
