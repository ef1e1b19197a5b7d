import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { Sandbox } from '@e2b/code-interpreter'
import { NotFoundError } from 'e2b'
import { seconds } from './world.mjs'

let sandbox
before(async () => {
  sandbox = await Sandbox.create({ timeoutMs: seconds(1800) })
})
after(async () => {
  await sandbox?.kill()
})

test('variables live in the context', async () => {
  await sandbox.runCode('x = 20')
  const execution = await sandbox.runCode('x += 1; print("out"); x * 2')

  assert.equal(execution.text, '42')
  assert.deepEqual(execution.logs.stdout, ['out\n'])
  assert.equal(execution.error, undefined)
})

test('callbacks see output as it comes', async () => {
  const seen = []
  const note = (message) => {
    seen.push([message.line, message.error])
    if (message.line.includes('one')) sandbox.files.write('/tmp/heard', '')
  }

  // It ends only when somebody has heard its first line.
  await sandbox.runCode(
    'import os, sys, time\nprint("one", flush=True)\nwhile not os.path.exists("/tmp/heard"): time.sleep(0.05)\n' +
      'print("two", flush=True)\nprint("bad", file=sys.stderr)',
    { onStdout: note, onStderr: note },
  )

  const at = (word) => seen.find(([line]) => line.includes(word))
  assert.ok(at('two'))
  assert.deepEqual([at('one')[1], at('bad')[1]], [false, true])
})

test('an error has name, value and traceback', async () => {
  const { error } = await sandbox.runCode('1 / 0')

  assert.deepEqual([error.name, error.value], ['ZeroDivisionError', 'division by zero'])
  assert.match(error.traceback, /Traceback/)
})

test('a plot is a picture and its data', async () => {
  const execution = await sandbox.runCode(
    'import matplotlib.pyplot as plt\nplt.bar(["a", "b"], [3, 2])\nplt.title("Bars")\nplt.show()',
  )

  const [result] = execution.results
  assert.ok(Buffer.from(result.png, 'base64').toString('latin1').startsWith('\x89PNG'))
  assert.equal(result.chart.type, 'bar')
  assert.equal(result.chart.title, 'Bars')
  assert.deepEqual(
    result.chart.elements.map(({ label, value }) => [label, value]),
    [['a', 3], ['b', 2]],
  )
})

test('contexts keep apart and have a directory', async () => {
  const context = await sandbox.createCodeContext({ cwd: '/tmp' })
  try {
    const execution = await sandbox.runCode('import os; os.getcwd(), "x" in globals()', { context })
    assert.equal(execution.text, "('/tmp', False)")
    assert.ok((await sandbox.listCodeContexts()).some(({ id }) => id === context.id))
  } finally {
    await sandbox.removeCodeContext(context)
  }
  await assert.rejects(sandbox.runCode('1', { context }), NotFoundError)
})

test('other languages run', async () => {
  const execution = await sandbox.runCode('const a: number = 41; a + 1', { language: 'typescript' })
  assert.equal(execution.text, '42')
})

test('code that takes too long is given up, and the state is kept', async () => {
  await sandbox.runCode('kept = 7')

  await assert.rejects(sandbox.runCode('while True: pass', { timeoutMs: seconds(2) }))

  assert.equal((await sandbox.runCode('kept')).text, '7')
})
