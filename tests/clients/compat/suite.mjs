// One case of the version matrix, run in a directory that has one release of the npm package `e2b` installed.
//
//   node suite.mjs CASE
//
// Exit code 0: it works. 3: this release does not have it. Anything else: it does not work.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as e2b from 'e2b'

const { Sandbox } = e2b
const scale = Number(process.env.EMBERBOX_TEST_SCALE ?? '1')
const seconds = (n) => n * 1000 * scale

class NotInThisRelease extends Error {}

async function withSandbox(use, options = {}) {
  const sandbox = await Sandbox.create('base', { timeoutMs: seconds(90), ...options })
  try {
    return await use(sandbox)
  } finally {
    await sandbox.kill()
  }
}

const cases = {
  async create_and_kill() {
    const sandbox = await Sandbox.create('base', {
      timeoutMs: seconds(90), metadata: { suite: 'compat' }, envs: { GREETING: 'hello' },
    })
    try {
      assert.equal(await sandbox.isRunning(), true)
      assert.equal((await sandbox.commands.run('echo $GREETING')).stdout, 'hello\n')
    } finally {
      await sandbox.kill()
    }
    assert.equal(await sandbox.isRunning(), false)
    assert.equal(await Sandbox.kill(sandbox.sandboxId), false)
  },

  async run() {
    await withSandbox(async (sandbox) => {
      const result = await sandbox.commands.run('echo out; echo err >&2')
      assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n', 'err\n', 0])
      await assert.rejects(sandbox.commands.run('exit 7'), (error) => error.exitCode === 7)
      assert.equal((await sandbox.commands.run('id -un; pwd', { user: 'root', cwd: '/tmp' })).stdout, 'root\n/tmp\n')
    })
  },

  async stream() {
    const seen = []
    await withSandbox((sandbox) =>
      sandbox.commands.run('echo one; sleep 1; echo two', { onStdout: (text) => seen.push([text, Date.now()]) })
    )
    const at = (word) => seen.find(([text]) => text.includes(word))[1]
    assert.ok(at('two') - at('one') > 500)
  },

  async background() {
    await withSandbox(async (sandbox) => {
      const handle = await sandbox.commands.run('sleep 1000', { background: true })
      assert.ok((await sandbox.commands.list()).some((each) => each.pid === handle.pid))
      assert.equal((await sandbox.commands.connect(handle.pid)).pid, handle.pid)
      assert.equal(await handle.kill(), true)
      await assert.rejects(handle.wait())
    })
  },

  async stdin() {
    await withSandbox(async (sandbox) => {
      const handle = await sandbox.commands.run('read line; echo got:$line', { background: true, stdin: true })
      await sandbox.commands.sendStdin(handle.pid, 'hello\n')
      assert.equal((await handle.wait()).stdout, 'got:hello\n')
    })
  },

  async command_timeout() {
    await withSandbox((sandbox) =>
      assert.rejects(sandbox.commands.run('sleep 1000', { timeoutMs: seconds(1) }), e2b.TimeoutError)
    )
  },

  async files() {
    const content = new Uint8Array(Array.from({ length: 25600 }, (_, n) => n % 256))
    await withSandbox(async (sandbox) => {
      await sandbox.files.write('dir/text.txt', 'wörld\n')
      await sandbox.files.write('dir/data.bin', content.buffer)
      assert.equal(await sandbox.files.read('dir/text.txt'), 'wörld\n')
      assert.deepEqual(new Uint8Array(await sandbox.files.read('dir/data.bin', { format: 'bytes' })), content)
      const parts = []
      for await (const part of await sandbox.files.read('dir/data.bin', { format: 'stream' })) parts.push(part)
      assert.deepEqual(new Uint8Array(Buffer.concat(parts)), content)
      assert.deepEqual((await sandbox.files.list('dir')).map((each) => each.name).sort(), ['data.bin', 'text.txt'])
      assert.equal((await sandbox.files.rename('dir/text.txt', 'dir/moved.txt')).path, '/home/user/dir/moved.txt')
      assert.equal(await sandbox.files.makeDir('dir/sub'), true)
      assert.equal(await sandbox.files.makeDir('dir/sub'), false)
      await sandbox.files.remove('dir')
      assert.equal(await sandbox.files.exists('dir'), false)
      await assert.rejects(sandbox.files.read('dir/moved.txt'), e2b.NotFoundError)
    })
  },

  async watch() {
    await withSandbox(async (sandbox) => {
      await sandbox.files.makeDir('watched')
      const names = []
      const handle = await sandbox.files.watchDir('watched', (event) => names.push(event.name))
      await sandbox.files.write('watched/new', 'x')
      for (let n = 0; n < 200 && !names.includes('new'); n++) await new Promise((resolve) => setTimeout(resolve, 50))
      await handle.stop()
      assert.ok(names.includes('new'))
    })
  },

  async terminal() {
    await withSandbox(async (sandbox) => {
      let output = ''
      const decoder = new TextDecoder()
      const onData = (data) => (output += decoder.decode(data))
      const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData })
      await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode('stty size; exit\n'))
      await terminal.wait()
      assert.ok(output.includes('24 80'), output)
    })
  },

  async list() {
    const mark = randomUUID()
    const metadata = { mark, 'odd key': 'a&b=c é' }
    await withSandbox(
      async (sandbox) => {
        const listed = await Sandbox.list({ query: { metadata } })
        const found = Array.isArray(listed) ? listed : await listed.nextItems()
        assert.deepEqual(found.map((each) => each.sandboxId), [sandbox.sandboxId])
        assert.equal(found[0].metadata.mark, mark)
      },
      { metadata }
    )
  },

  async set_timeout() {
    await withSandbox(async (sandbox) => {
      await sandbox.setTimeout(1_000_000)
      const info = await sandbox.getInfo()
      assert.ok(info.endAt - Date.now() > 500_000)
    })
  },

  async pause_and_connect() {
    if (!Sandbox.prototype.pause && !Sandbox.prototype.betaPause) throw new NotInThisRelease('no pause in this release')
    await withSandbox(async (sandbox) => {
      await sandbox.files.write('kept.txt', 'kept')
      const sleeper = await sandbox.commands.run('sleep 1000', { background: true })
      await (sandbox.pause ? sandbox.pause() : sandbox.betaPause())
      const again = await Sandbox.connect(sandbox.sandboxId)
      assert.equal(await again.files.read('kept.txt'), 'kept')
      assert.ok((await again.commands.list()).some((each) => each.pid === sleeper.pid))
    })
  },

  async errors() {
    await assert.rejects(Sandbox.create('no-such-template'), e2b.SandboxError)
  },

  async signed_urls() {
    await withSandbox(
      async (sandbox) => {
        await sandbox.files.write('file.txt', 'signed')
        const headers = { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': '49983' }
        const answer = await fetch(await sandbox.downloadUrl('file.txt'), { headers })
        assert.equal(await answer.text(), 'signed')
      },
      { secure: true }
    )
  },

  async template_build() {
    if (!e2b.Template) throw new NotInThisRelease('no templates in this release')
    const alias = `compat-${randomUUID().slice(0, 8)}`
    const folder = mkdtempSync(join(tmpdir(), 'emberbox-compat-'))
    try {
      writeFileSync(join(folder, 'note.txt'), 'note\n')
      const template = e2b.Template({ fileContextPath: folder })
        .fromTemplate('base')
        .copy('note.txt', '/home/user/')
        .runCmd('cat /home/user/note.txt > /home/user/copy.txt')
      await e2b.Template.build(template, { alias })
    } finally {
      rmSync(folder, { recursive: true })
    }
    const sandbox = await Sandbox.create(alias, { timeoutMs: seconds(90) })
    try {
      assert.equal(await sandbox.files.read('copy.txt'), 'note\n')
    } finally {
      await sandbox.kill()
    }
  },
}

if (process.argv[2] === '--list') {
  console.log(Object.keys(cases).join('\n'))
  process.exit(0)
}
try {
  await cases[process.argv[2]]()
  process.exit(0)
} catch (error) {
  if (error instanceof NotInThisRelease) {
    console.log(error.message)
    process.exit(3)
  }
  console.error(error)
  process.exit(1)
}
